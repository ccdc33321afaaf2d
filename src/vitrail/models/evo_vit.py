"""Evo-ViT (Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", arXiv:2108.01390) on DeiT.

A patch token's score is the class token's attention to it, averaged over the blocks. The later blocks compute only the
tokens with the best scores; the others are carried along unchanged and rejoin after the block (layer-wise) or after the
stage (stage-wise). Nothing in the selection is learned. Training and evaluation compute the same.

Training is layer-wise first and stage-wise later. The mode is a buffer, `stage_wise`: checkpoints and EMA weights
contain it, and evaluation uses the mode of the training.

Numerically equal to the official code (github.com/YifanXu74/Evo-ViT, commit 4c5d9b3, `deit/`); its checkpoints load.

Differences from that code (docs/fidelity.md has the whole table):
- timm's block and names; `convert_evo_deit` converts the official ones.
- Scores are the mean over heads, not the sum, which is a common factor.
- Any depth and any stages; the official code has 12 blocks and stages at 4 and 8.
- `forward_intermediates` computes all tokens, without selection.

Shapes: B images, P prefix tokens, N patch tokens, K kept patch tokens, S selections, D channels, C classes, H heads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitrail.models.registry import build, vit_cfg
from vitrail.models.token_selection import (
    LayerToStage,
    best_positions,
    block_ratios,
    check_shares,
    gather_tokens,
    keep_mask,
    kept_count,
    restore_tokens,
)
from vitrail.types import Outputs


class ScoringAttention(Attention):
    """timm's attention that can also return the class token's attention to the patch tokens."""

    def forward(self, x: Tensor, scored: bool = False, **mask: Any) -> Any:
        """Map (B, 1 + N, D) to the same shape; with `scored` also return the attention (B, N), mean over heads."""
        if not scored:
            return super().forward(x, **mask)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, 1 + N, D / H)
        q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        with torch.no_grad():
            row = (q[:, :, :1] * self.scale) @ k.transpose(-2, -1)  # (B, H, 1, 1 + N)
            scores = row.float().softmax(-1).mean(1)[:, 0, 1:]
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2)))), scores


class ScoringBlock(Block):
    """timm's block that can also return the class token's attention to the patch tokens."""

    def forward(self, x: Tensor, scored: bool = False, **mask: Any) -> Any:
        """Map (B, 1 + N, D) to the same shape; with `scored` also return the scores (B, N)."""
        if not scored:
            return super().forward(x, **mask)
        out, scores = self.attn(self.norm1(x), scored=True)
        x = x + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), scores


class EvoViT(LayerToStage, VisionTransformer):
    """timm's ViT with Evo-ViT's selection of tokens, mean pooling, and a second classifier of the class token.

    Args:
        keep_ratio: share of the patch tokens that later blocks compute, rounded down; or one share for each block.
        tradeoff: weight of the newest block in the scores, for each block; None means 1 before the first stage and 0.5
            from there on, as published.
        stages: first block of each stage that selects tokens, counted from 0. A stage ends where the next one starts.
        stage_wise_from: share of the epochs after which training selects once per stage instead of before every block.
        kwargs: arguments of timm's VisionTransformer.

    Raises:
        ValueError: a ratio, tradeoff or stage is not possible.
    """

    outputs = frozenset({"class_token", "decisions"})

    def __init__(
        self,
        keep_ratio: float | Sequence[float] = 0.5,
        tradeoff: Sequence[float] | None = None,
        stages: Sequence[int] = (4, 8),
        stage_wise_from: float = 2 / 3,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate: this backbone drops patches itself; set it to 0.")
        super().__init__(**{"global_pool": "avg", "block_fn": ScoringBlock, "attn_layer": ScoringAttention, **kwargs})
        depth = len(self.blocks)
        if not stages or list(stages) != sorted(set(stages) & set(range(1, depth))):
            raise ValueError(f"stages={list(stages)}: needs ascending numbers of blocks after the first.")
        first = stages[0]
        tradeoff = [1.0] * first + [0.5] * (depth - first) if tradeoff is None else tradeoff
        self.keep_ratios, self.stages = block_ratios(keep_ratio, depth, first), tuple(stages)
        self.tradeoff = check_shares("tradeoff", tradeoff, depth)
        # Before the first selection, scores with a weight of 1 replace all earlier ones, which are not computed then.
        self._first_scored = max((number for number in range(first) if self.tradeoff[number] == 1), default=0)
        device = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.head_cls: nn.Module = self._new_class_head()
        self.norm_cls = type(self.fc_norm)(self.embed_dim, eps=self.fc_norm.eps, **device)
        self.add_mode(stage_wise_from, kwargs.get("device"))

    def _new_class_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        weight = next(self.parameters())
        head = nn.Linear(self.embed_dim, self.num_classes, device=weight.device, dtype=weight.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def convert_checkpoint(self, weights: Mapping[str, Tensor], _: str) -> dict[str, Tensor]:
        """Return weights under this model's names; those of official checkpoints are converted."""
        return convert_evo_deit(weights)

    # Forward

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, C) of the mean patch token."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, **mask: Any) -> Tensor:
        """Return all tokens (B, P + N, D), without the final norm, which follows the pooling."""
        return self._features_and_positions(x)[0]

    def forward_outputs(self, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return the class logits (B, C) of the mean patch token, `class_token` and `decisions`.

        `class_token` (B, C) are the logits of the class token. `decisions` (B, S, N) are 1 for the patch tokens that
        each selection keeps.
        """
        features, positions = self._features_and_positions(images)
        tokens = features.shape[1] - self.num_prefix_tokens
        class_token = self.head_cls(self.head_drop(self.norm_cls(features[:, 0])))
        decisions = torch.stack([keep_mask(chosen, tokens) for chosen in positions], 1)
        return Outputs(self.forward_head(features), extras={"class_token": class_token, "decisions": decisions})

    @property
    def selection_blocks(self) -> tuple[int, ...]:
        """Blocks before which tokens are selected, counted from 0."""
        return self.stages if self._stage_wise else tuple(range(self.stages[0], len(self.blocks)))

    def _features_and_positions(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return all tokens (B, P + N, D), and the positions (B, K) of each selection."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(images)))
        prefix = self.num_prefix_tokens
        starts = self.selection_blocks
        scores: Tensor | None = None
        chosen: Tensor | None = None
        kept, selections = x, []
        for number, block in enumerate(self.blocks):
            if number in starts:  # the tokens that were left out rejoin, and the next ones are chosen
                x = kept if chosen is None else restore_tokens(x, kept, chosen, prefix)
                assert scores is not None
                count = kept_count(x.shape[1] - prefix, self.keep_ratios[number])
                chosen = best_positions(scores, count)
                kept = gather_tokens(x, chosen, prefix)
                selections.append(chosen)
            if not self._first_scored <= number < starts[-1]:  # no selection needs the scores
                kept = self._block(block, kept)
                continue
            kept, attention = self._block(block, kept, True)
            scores = _updated(scores, attention, self.tradeoff[number], chosen)
        return self.norm(kept if chosen is None else restore_tokens(x, kept, chosen, prefix)), selections

    def _block(self, block: nn.Module, x: Tensor, scored: bool = False) -> Any:
        return checkpoint(block, x, scored) if self.grad_checkpointing and self.training else block(x, scored=scored)

    # Classifiers

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Return the classifiers of the mean patch token and of the class token."""
        return self.head, self.head_cls

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers by newly initialised ones for another number of classes."""
        super().reset_classifier(num_classes, global_pool)
        self.head_cls = self._new_class_head()


def _updated(scores: Tensor | None, attention: Tensor, weight: float, positions: Tensor | None) -> Tensor:
    """Return the scores (B, N) after a block whose class attention is (B, K), at positions (B, K) or at all."""
    if scores is None:
        return attention
    if positions is None:
        return torch.lerp(scores, attention, weight)
    return scores.scatter(1, positions, torch.lerp(scores.gather(1, positions), attention, weight))


def convert_evo_deit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an official Evo-ViT checkpoint (`deit/`) under vitrail's names; other weights unchanged.

    `norms.i`, `qks.i.qk`, `vs.i.v` and `projs.i` become `blocks.i.norm1`, rows of `blocks.i.attn.qkv`, and
    `blocks.i.attn.proj`; `norm` becomes `fc_norm`. Published checkpoints are trained to the end: stage-wise.
    """
    if not any(re.match(r"qks\.\d+\.qk\.", key) for key in weights):
        return dict(weights)
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        if found := re.fullmatch(r"qks\.(\d+)\.qk\.(\w+)", key):
            rows = torch.cat((value, weights[f"vs.{found[1]}.v.{found[2]}"]))
            converted[f"blocks.{found[1]}.attn.qkv.{found[2]}"] = rows
        elif not re.match(r"vs\.\d+\.v\.", key):
            name = re.sub(r"^norms\.(\d+)\.", r"blocks.\1.norm1.", key)
            name = re.sub(r"^projs\.(\d+)\.", r"blocks.\1.attn.proj.", name)
            converted[re.sub(r"^norm\.", "fc_norm.", name)] = value
    return {"stage_wise": torch.tensor(True), **converted}


# ---------------------------------------------------------------------------------------------------- registration


def _cfg() -> dict[str, Any]:
    return vit_cfg(crop_pct=0.875, license="mit", paper_ids="arXiv:2108.01390", classifier=("head", "head_cls"))


default_cfgs = generate_default_cfgs(
    {f"evo_deit_{size}_patch16_224.untrained": _cfg() for size in ("tiny", "small", "base")}
)


def _create(size: str, num_heads: int, pretrained: bool, kwargs: dict[str, Any]) -> EvoViT:
    config = {"embed_dim": 64 * num_heads, "depth": 12, "num_heads": num_heads}
    return build(EvoViT, f"evo_deit_{size}_patch16_224", pretrained, kwargs, **config)


@register_model
def evo_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-Ti: 5.9 M parameters, 0.8 G MACs, 72.0 % top-1."""
    return _create("tiny", 3, pretrained, kwargs)


@register_model
def evo_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-S: 22.4 M parameters, 3.0 G MACs, 79.4 % top-1."""
    return _create("small", 6, pretrained, kwargs)


@register_model
def evo_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-B: 11.7 G MACs, 81.3 % top-1."""
    return _create("base", 12, pretrained, kwargs)
