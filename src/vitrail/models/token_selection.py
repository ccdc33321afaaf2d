"""Selection of patch tokens by their scores, shared by DynamicViT, Evo-ViT and Evo-LeViT.

A model scores its patch tokens and keeps the best. Either it gathers the kept tokens and computes with those only, or
it keeps all tokens and masks the others in attention. Tokens before the patches (the class token) are always kept.
Positions are in ascending order, so that kept tokens stay in image order.

Shapes: B images, P prefix tokens, N patch tokens, K kept patch tokens, D channels, T = P + N, H heads,
S selections.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor


def stage_ratios(keep_ratio: float | Sequence[float], stages: int) -> tuple[float, ...]:
    """Return the share of the image's patch tokens that each stage keeps: r, r^2, ... for a single number r.

    Raises:
        ValueError: a ratio is outside (0, 1], or their number is not `stages`.
    """
    single = isinstance(keep_ratio, int | float)
    ratios = [keep_ratio ** (stage + 1) for stage in range(stages)] if single else list(keep_ratio)  # type: ignore
    if len(ratios) != stages:
        raise ValueError(f"keep_ratio={ratios}: needs one number, or {stages}, one for each stage.")
    if any(not 0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"keep_ratio={keep_ratio}: must be above 0 and at most 1.")
    return tuple(float(ratio) for ratio in ratios)


def block_ratios(keep_ratio: float | Sequence[float], depth: int, first: int) -> tuple[float, ...]:
    """Return the share of the patch tokens that each block computes; a single number holds from block `first` on.

    Raises:
        ValueError: as `check_shares`.
    """
    single = isinstance(keep_ratio, int | float)
    ratios = [1.0] * first + [keep_ratio] * (depth - first) if single else keep_ratio
    return check_shares("keep_ratio", ratios, depth)  # type: ignore[arg-type]


def check_shares(name: str, values: Sequence[float], depth: int) -> tuple[float, ...]:
    """Return the `depth` values of an argument, one for each block.

    Raises:
        ValueError: a value is outside (0, 1], or their number is not `depth`.
    """
    if len(values) != depth or any(not 0 < value <= 1 for value in values):
        raise ValueError(f"{name}={list(values)}: needs {depth} numbers, one per block, above 0 and at most 1.")
    return tuple(float(value) for value in values)


def kept_count(tokens: int, ratio: float) -> int:
    """Return how many of `tokens` patch tokens to keep: their share, rounded down, at least one."""
    return max(1, int(tokens * ratio))


def best_positions(scores: Tensor, count: int) -> Tensor:
    """Return the positions (B, K) of the `count` largest of scores (B, N), in ascending order."""
    return scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def gather_tokens(x: Tensor, positions: Tensor, prefix: int = 0) -> Tensor:
    """Return the prefix tokens and the patch tokens at positions (B, K) of x (B, P + N, D): (B, P + K, D)."""
    return x.flatten(0, 1).index_select(0, _rows(x, positions, prefix)).unflatten(0, (len(x), -1))


def restore_tokens(x: Tensor, kept: Tensor, positions: Tensor, prefix: int = 0) -> Tensor:
    """Return x (B, P + N, D) with prefix tokens and positions (B, K) replaced by kept (B, P + K, D); x is unchanged."""
    rows = _rows(x, positions, prefix)
    return x.flatten(0, 1).index_copy(0, rows, kept.flatten(0, 1).to(x.dtype)).view_as(x)


def _rows(x: Tensor, positions: Tensor, prefix: int) -> Tensor:
    """Return the rows of x (B, P + N, D), seen as (B * (P + N), D), of prefix tokens and positions: (B * (P + K),).

    Whole rows are copied, which is several times faster than to gather or scatter single numbers.
    """
    first = torch.arange(prefix, device=x.device).expand(len(x), -1)
    starts = x.shape[1] * torch.arange(len(x), device=x.device)
    return (torch.cat((first, positions + prefix), 1) + starts[:, None]).flatten()


def keep_mask(positions: Tensor, tokens: int) -> Tensor:
    """Return a mask (B, N) with 1 at positions (B, K) and 0 elsewhere, in float32."""
    mask = torch.zeros(len(positions), tokens, device=positions.device)
    return mask.scatter(1, positions, 1.0)


def enlarge_masks(kept: Tensor, grid: tuple[int, int], to: tuple[int, int], factor: int) -> Tensor:
    """Return masks (B, S, N) of a grid (rows, columns) on the grid `to`, which is `factor` times finer."""
    rows, columns = (torch.arange(side, device=kept.device) // factor for side in to)
    return kept.unflatten(2, grid)[:, :, rows][:, :, :, columns].flatten(2)


def merge_left_out(x: Tensor, scores: Tensor, positions: Tensor, prefix: int = 0) -> Tensor:
    """Return one token (B, 1, D), the mean of the patch tokens of x (B, P + N, D) that are not at positions (B, K).

    Their weights are their scores (B, N), which get a gradient.
    """
    weights = scores * (1 - keep_mask(positions, scores.shape[1]))
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (weights[..., None] * x[:, prefix:]).sum(1, keepdim=True).to(x.dtype)


def draw_decisions(log_probabilities: Tensor, kept: Tensor | None) -> Tensor:
    """Draw which tokens to keep, 1 or 0 (B, N), with the gradient of the soft probability.

    Args:
        log_probabilities: (B, N, 2), of keeping and of dropping each token.
        kept: earlier decisions (B, N): a dropped token stays dropped. None: all tokens are still there.
    """
    drawn = F.gumbel_softmax(log_probabilities, tau=1.0, hard=True, dim=-1)[..., 0]
    return drawn if kept is None else drawn * kept


def masked_softmax(scores: Tensor, keep: Tensor, eps: float = 1e-6) -> Tensor:
    """Return attention weights (B, H, T, T) in which every token attends to kept tokens and to itself.

    The gradient reaches `keep`. As published, the maximum is taken over all tokens, and `eps` is added to the sum and
    spread over all tokens. If a dropped token's score exceeds all kept ones by 14 or more, the weights therefore become
    uniform over all tokens. With `eps=0` the maximum is taken over the tokens attended to, and none of this happens.

    Args:
        scores: attention scores (B, H, T, T).
        keep: (B, T), 1 for kept tokens, 0 for dropped ones.
        eps: see above.
    """
    scores, tokens = scores.float(), scores.shape[-1]
    diagonal = torch.eye(tokens, device=keep.device, dtype=keep.dtype)
    allowed = (keep[:, None, None, :] * (1 - diagonal) + diagonal).float()  # (B, 1, T, T)
    visible = scores if eps else scores.masked_fill(allowed == 0, float("-inf"))
    shifted = scores - visible.max(-1, keepdim=True).values  # with eps, its gradient matters
    weights = (shifted if eps else shifted.clamp(max=0)).exp() * allowed
    return (weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps)


class MaskedAttention(Attention):
    """timm's attention with an option to mask dropped tokens."""

    mask_eps = 1e-6
    """See `masked_softmax`."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to the same shape; `keep` (B, T) masks dropped tokens."""
        if keep is None:
            return super().forward(x)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        scores = (self.q_norm(q) * self.scale) @ self.k_norm(k).transpose(-2, -1)
        weights = self.attn_drop(masked_softmax(scores, keep, self.mask_eps).to(v.dtype))
        return self.proj_drop(self.proj(self.norm((weights @ v).transpose(1, 2).flatten(2))))


class LayerToStage:
    """Mixin: selection before every block (layer-wise) in the first epochs, once per stage (stage-wise) in the others.

    The mode is a buffer, `stage_wise`, so that checkpoints and EMA weights contain it. List this class before the
    backbone's among the bases, and call `add_mode` in the constructor.
    """

    stage_wise_from: float

    def add_mode(self, stage_wise_from: float, device: torch.device | str | None = None) -> None:
        """Add the mode, at first layer-wise; stage-wise after the share `stage_wise_from` of the epochs."""
        model: Any = self
        self.stage_wise_from, self._stage_wise = stage_wise_from, False  # the buffer's value on the host
        model.register_buffer("stage_wise", torch.tensor(False, device=device))
        model.register_load_state_dict_post_hook(lambda loaded, _: loaded._read_mode())

    @property
    def stage_wise_prune(self) -> bool:
        """Whether tokens are selected once per stage rather than before every block; can be set."""
        return self._stage_wise

    @stage_wise_prune.setter
    def stage_wise_prune(self, stage_wise: bool) -> None:
        model: Any = self
        self._stage_wise = bool(stage_wise)
        model.stage_wise.fill_(self._stage_wise)

    def _read_mode(self) -> None:
        model: Any = self
        if not model.stage_wise.is_meta:
            self._stage_wise = bool(model.stage_wise)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Choose the mode of training epoch `epoch`, counted from 0, of `epochs`."""
        self.stage_wise_prune = epoch >= self.stage_wise_from * epochs - 1e-6
