"""DynamicViT (Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
arXiv:2106.02034) on DeiT and LV-ViT.

Before three of the blocks, a predictor scores the patch tokens. In training all tokens stay, because images keep
different numbers of them: decisions are drawn, and attention masks dropped tokens. In evaluation the best tokens are
gathered, the same number for every image, and the others are gone.

Numerically equal to the official code (github.com/raoyongming/DynamicViT, commit 1322e62); its checkpoints load, and so
do those of the dense backbone (`init_from`), with new predictors.

Differences from that code (docs/fidelity.md has the whole table):
- `model(images)` returns one (B, C) tensor in training mode too; `forward_heads` returns the decisions and tokens.
- Blocks before the first stage use plain attention. The official code masks with ones, and adds its epsilon.
- Every image size works; the official code needs 14 x 14 patches.
- `forward_intermediates` computes all tokens, without selection.

Shapes: B images, P prefix tokens, N patch tokens, K kept patch tokens, S stages, D channels, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrail.models.heads import TokenHead
from vitrail.models.lv_vit import LVViT, ScaledBlock
from vitrail.models.mlp import LeanMlp
from vitrail.models.registry import build, vit_cfg
from vitrail.models.token_selection import (
    MaskedAttention,
    best_positions,
    draw_decisions,
    gather_tokens,
    keep_mask,
    kept_count,
    stage_ratios,
)
from vitrail.types import Outputs


class ScorePredictor(nn.Module):
    """Predictor of the log-probabilities of keeping and of dropping each patch token.

    Half of the channels describe the token, half the mean of the tokens that are still kept.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, D) to log-probabilities (B, N, 2); `keep` (B, N) is 0 for tokens that are dropped."""
        own, others = self.in_conv(x).chunk(2, dim=-1)
        if keep is None:
            mean = others.mean(1, keepdim=True)
        else:  # the official code divides 0 by 0 if an image has no token left
            mean = (others * keep[..., None]).sum(1, keepdim=True) / keep.sum(1).clamp(min=1e-6)[:, None, None]
        return self.out_conv(torch.cat((own, mean.expand_as(own)), -1)).log_softmax(-1)


class DynamicTokens(VisionTransformer):
    """Mixin for ViTs that drops patch tokens stage by stage.

    List it before the backbone's class among the bases. Its blocks must pass keyword arguments on to their attention.

    Args:
        keep_ratio: share r of the patch tokens that the first stage keeps; later ones keep r^2, r^3, ... of all patch
            tokens of the image. Or one share for each stage.
        selection_blocks: blocks before which tokens are dropped, counted from 0.
        mask_eps: epsilon of the masked attention, see `masked_softmax`; 0 keeps dropped tokens out completely.
        kwargs: arguments of the backbone.

    Raises:
        ValueError: a ratio, block or rate of patch dropout is not possible.
    """

    mixes_tokens = False
    new_modules = ("score_predictor",)  # not in checkpoints of the dense backbone
    outputs = frozenset({"decisions", "features"})

    def __init__(
        self,
        keep_ratio: float | Sequence[float] = 0.7,
        selection_blocks: Sequence[int] = (3, 6, 9),
        mask_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate: this backbone drops patches itself; set it to 0.")
        super().__init__(**{"attn_layer": MaskedAttention, **kwargs})
        for block in self.blocks:
            block.attn.mask_eps = mask_eps
        if list(selection_blocks) != sorted(set(selection_blocks) & set(range(len(self.blocks)))):
            raise ValueError(f"selection_blocks={list(selection_blocks)}: needs ascending numbers of blocks.")
        self.selection_blocks = tuple(selection_blocks)
        self.keep_ratios = stage_ratios(keep_ratio, len(self.selection_blocks))
        self.score_predictor = nn.ModuleList(ScorePredictor(self.embed_dim) for _ in self.selection_blocks)
        for module in self.score_predictor.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.score_predictor.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, C)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, **mask: Any) -> Tensor:
        """Return normalised features: in training of all tokens (B, P + N, D), in evaluation of kept ones."""
        return self._features_and_decisions(x)[0]

    def forward_outputs(self, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return the class logits (B, C), `decisions` and `features` for images (B, 3, H, W).

        `decisions` (B, S, N) are 1 for the patch tokens that each stage keeps. `features` are the normalised patch
        tokens: all of them (B, N, D) in training, the kept ones in evaluation.
        """
        features, decisions = self._features_and_decisions(images)
        extras = {"decisions": decisions, "features": features[:, self.num_prefix_tokens :]}
        return Outputs(self.forward_head(features), extras=extras)

    def _features_and_decisions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm_pre(self._pos_embed(self.patch_embed(images)))
        x, decisions = self._mask_tokens(x) if self.training else self._drop_tokens(x)
        return self.norm(x), decisions

    def _block(self, block: nn.Module, x: Tensor, **keep: Tensor) -> Tensor:
        return checkpoint(block, x, **keep) if self.grad_checkpointing and self.training else block(x, **keep)

    def _mask_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks on all tokens (B, P + N, D) with masks that are drawn; return tokens and decisions."""
        prefix, kept = self.num_prefix_tokens, None
        decisions: list[Tensor] = []
        mask: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            if number in self.selection_blocks:
                scores = self.score_predictor[len(decisions)](x[:, prefix:], kept)  # (B, N, 2)
                kept = draw_decisions(scores.float(), kept)
                decisions.append(kept)
                mask = {"keep": F.pad(kept, (prefix, 0), value=1.0)}  # (B, P + N)
            x = self._block(block, x, **mask)
        return x, torch.stack(decisions, 1)

    def _drop_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks on fewer and fewer of the tokens (B, P + N, D); return kept tokens and decisions."""
        prefix = self.num_prefix_tokens
        decisions: list[Tensor] = []
        tokens, positions = x.shape[1] - prefix, None
        for number, block in enumerate(self.blocks):
            if number in self.selection_blocks:
                stage = len(decisions)
                scores = self.score_predictor[stage](x[:, prefix:])[..., 0]
                chosen = best_positions(scores, min(scores.shape[1], kept_count(tokens, self.keep_ratios[stage])))
                x = gather_tokens(x, chosen, prefix)
                positions = chosen if positions is None else positions.gather(1, chosen)
                decisions.append(keep_mask(positions, tokens))
            x = self._block(block, x)
        return x, torch.stack(decisions, 1)


class DynamicDeiT(DynamicTokens):
    """DeiT with DynamicViT's selection of tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"block_fn": ScaledBlock, "mlp_layer": LeanMlp, **kwargs})


class DynamicLVViT(TokenHead, DynamicTokens, LVViT):
    """LV-ViT with DynamicViT's selection of tokens.

    In evaluation the logits are those of the class token plus half the maximum over the kept tokens.
    """

    mixes_tokens = False
    outputs = frozenset({"tokens", "decisions"})

    def forward_outputs(self, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return class logits (B, C), token logits (B, N, C) and `decisions` (B, S, N) for images (B, 3, H, W).

        In evaluation there are token logits (B, K, C) of the kept tokens only, in image order.
        """
        features, decisions = self._features_and_decisions(images)
        cls = VisionTransformer.forward_head(self, features)
        return Outputs(cls, self.token_logits(features), extras={"decisions": decisions})


# ---------------------------------------------------------------------------------------------------- registration


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return vit_cfg(crop_pct=0.875, license="mit", paper_ids="arXiv:2106.02034", **kwargs)


def _lv_cfg() -> dict[str, Any]:
    return _cfg(first_conv="patch_embed.conv1", classifier=("head", "aux_head"))


default_cfgs = generate_default_cfgs(
    {
        "dynamicvit_deit_256.untrained": _cfg(),
        "dynamicvit_deit_tiny.untrained": _cfg(),
        "dynamicvit_deit_small.untrained": _cfg(),
        "dynamicvit_deit_base.untrained": _cfg(),
        "dynamicvit_lvvit_s.untrained": _lv_cfg(),
        "dynamicvit_lvvit_m.untrained": _lv_cfg(),
        "dynamicvit_lvvit_nano.untrained": _lv_cfg() | {"input_size": (3, 64, 64), "num_classes": 10, "crop_pct": 1.0},
    }
)


def _deit(variant: str, pretrained: bool, kwargs: dict[str, Any], **architecture: Any) -> DynamicDeiT:
    return build(DynamicDeiT, variant, pretrained, kwargs, depth=12, **architecture)


@register_model
def dynamicvit_deit_256(pretrained: bool = False, **kwargs: Any) -> DynamicDeiT:
    """DynamicViT on a DeiT of width 256: 10.3 M parameters, 1.4 G MACs and 76.5 % top-1 at a keep ratio of 0.7."""
    return _deit("dynamicvit_deit_256", pretrained, kwargs, embed_dim=256, num_heads=4)


@register_model
def dynamicvit_deit_tiny(pretrained: bool = False, **kwargs: Any) -> DynamicDeiT:
    """DynamicViT on DeiT-Ti: 5.9 M parameters; no published result."""
    return _deit("dynamicvit_deit_tiny", pretrained, kwargs, embed_dim=192, num_heads=3)


@register_model
def dynamicvit_deit_small(pretrained: bool = False, **kwargs: Any) -> DynamicDeiT:
    """DynamicViT on DeiT-S: 22.8 M parameters, 3.0 G MACs and 79.3 % top-1 at a keep ratio of 0.7."""
    return _deit("dynamicvit_deit_small", pretrained, kwargs, embed_dim=384, num_heads=6)


@register_model
def dynamicvit_deit_base(pretrained: bool = False, **kwargs: Any) -> DynamicDeiT:
    """DynamicViT on DeiT-B: 11.5 G MACs and 81.4 % top-1 at a keep ratio of 0.7."""
    return _deit("dynamicvit_deit_base", pretrained, kwargs, embed_dim=768, num_heads=12)


def _lvvit(variant: str, pretrained: bool, kwargs: dict[str, Any], **architecture: Any) -> DynamicLVViT:
    return build(DynamicLVViT, variant, pretrained, kwargs, **{"mlp_ratio": 3, "skip_lam": 2, **architecture})


@register_model
def dynamicvit_lvvit_s(pretrained: bool = False, **kwargs: Any) -> DynamicLVViT:
    """DynamicViT on LV-ViT-S: 26.9 M parameters, 4.7 G MACs and 83.1 % top-1 at a keep ratio of 0.7."""
    config = {"embed_dim": 384, "depth": 16, "num_heads": 6, "selection_blocks": (4, 8, 12)}
    return _lvvit("dynamicvit_lvvit_s", pretrained, kwargs, **config)


@register_model
def dynamicvit_lvvit_m(pretrained: bool = False, **kwargs: Any) -> DynamicLVViT:
    """DynamicViT on LV-ViT-M: 8.6 G MACs and 83.8 % top-1 at a keep ratio of 0.7."""
    config = {"embed_dim": 512, "depth": 20, "num_heads": 8, "selection_blocks": (5, 10, 15)}
    return _lvvit("dynamicvit_lvvit_m", pretrained, kwargs, **config)


@register_model
def dynamicvit_lvvit_nano(pretrained: bool = False, **kwargs: Any) -> DynamicLVViT:
    """DynamicViT on LV-ViT-nano, for images of 64 pixels: drops tokens before the second block and later ones."""
    config = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "stem_width": 16}
    return _lvvit("dynamicvit_lvvit_nano", pretrained, kwargs, skip_lam=1, selection_blocks=(1, 2, 3), **config)
