"""ViT-5 (Wang et al., "ViT-5: Vision Transformers for the Mid-2020s", arXiv:2602.08071): a ViT with RMSNorm,
LayerScale, normalised queries and keys, learned positions as well as 2-D rotary ones, and four register tokens.

Built from timm's `Eva`, whose parameter names are those of the official code (github.com/wangf3014/ViT-5, commit
b7b0796). Numerically equal to that code; its checkpoints load.

What timm's `Eva` does not do, and is added here:
- Registers are rotated too, as a square grid of their own with base 100.
- Stochastic depth has one rate in all blocks.
- No weight is rescaled with depth at initialisation.

Differences from the official code (docs/fidelity.md has the whole table):
- The order of tokens is class, registers, patches, as in timm; the official one has the registers last. Attention does
  not depend on the order.
- Images need not be square; positions are rows and columns of the patch grid.
- `drop_rate` works (dropout before the classifier); in the official code it raises an error.
- The rotation is one table for all blocks. It is not in checkpoints.

Shapes: B images, C channels of the image, H x W pixels, N patch tokens, R register tokens, D channels of a head.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, RmsNormFp32, RotaryEmbeddingCat
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import Eva
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.registry import build, vit_cfg

_PATCH_BASE, _REGISTER_BASE = 10000.0, 100.0  # wavelengths of the rotation go up to 2 pi times the base, in cells

_BANDS = {".attn.rope.freqs": _PATCH_BASE, ".attn.rope_reg.freqs": _REGISTER_BASE}


class ViT5(Eva):
    """timm's `Eva` with rotated registers, constant stochastic depth, and ViT-5's initialisation.

    Args:
        num_reg_tokens: number of register tokens, a square number.
        drop_path_rate: stochastic depth rate of every block.
        kwargs: other arguments of timm's `Eva`.

    Raises:
        ValueError: the number of registers is not a square.
    """

    def __init__(self, num_reg_tokens: int = 4, drop_path_rate: float = 0.0, **kwargs: Any) -> None:
        side = math.isqrt(num_reg_tokens)
        if side * side != num_reg_tokens:
            raise ValueError(f"num_reg_tokens={num_reg_tokens}: registers form a square grid; choose 0, 1, 4 or 9.")
        defaults = {
            "qkv_bias": False,
            "norm_layer": partial(RmsNormFp32, eps=1e-6),
            "init_values": 1e-4,
            "no_embed_class": True,
            "use_rot_pos_emb": True,
            "rope_temperature": _PATCH_BASE,
            "global_pool": "token",
            "head_init_scale": 1.0,
        }
        super().__init__(num_reg_tokens=num_reg_tokens, **{**defaults, **kwargs})
        options = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        head_dim = self.embed_dim // self.blocks[0].attn.num_heads
        for block in self.blocks:
            attention = block.attn
            attention.num_prefix_tokens = 1  # only the class token is not rotated
            attention.q_norm = RmsNormFp32(head_dim, eps=1e-6, **options)
            attention.k_norm = RmsNormFp32(head_dim, eps=1e-6, **options)
            block.drop_path1 = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
            block.drop_path2 = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.register_rope = None
        if side:
            self.register_rope = RotaryEmbeddingCat(
                head_dim, temperature=_REGISTER_BASE, in_pixels=False, feat_shape=[side, side], **options
            )

    def fix_init_weight(self) -> None:
        """Keep the initial weights as drawn; timm's `Eva` divides some of them by the square root of the depth."""

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay; older versions of timm omit the registers."""
        return super().no_weight_decay() | {"reg_token"}

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add positions and prefix tokens to patches; return tokens (B, 1 + R + N, C) and their rotation.

        The rotation is (R + N, 2 D) sines and cosines, or (B, 1, R + N, 2 D) with patch dropout.
        """
        x, rotation = super()._pos_embed(x)
        if self.register_rope is not None and rotation is not None:
            registers = self.register_rope.get_embed()  # (R, 2 D)
            registers = registers.to(rotation).expand(*rotation.shape[:-2], -1, -1)
            rotation = torch.cat((registers, rotation), -2)
        return x, rotation

    def convert_checkpoint(self, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Return the weights of an official checkpoint without the constants of its rotation.

        Args:
            weights: state dict with the official names.
            source: start of error messages: the config key and the file.

        Raises:
            ConfigError: the weights were trained with another rotation.
        """
        return drop_rotary_bands(weights, source)


def drop_rotary_bands(weights: dict[str, Tensor], source: str = "ckpt") -> dict[str, Tensor]:
    """Drop the constant buffers `rope.freqs` and `rope_reg.freqs` of every block from an official state dict.

    Each holds the D / 4 angles per cell of one axis, base^(-k / (D / 4)).

    Raises:
        ConfigError: their values are not those of ViT-5, so the weights were trained with another rotation.
    """
    kept = {}
    for key, value in weights.items():
        base = next((base for end, base in _BANDS.items() if key.endswith(end)), None)
        if base is None:
            kept[key] = value
            continue
        expected = base ** -(torch.arange(len(value), dtype=torch.float64) / len(value))
        if not torch.allclose(value.double().cpu(), expected, rtol=1e-4):
            raise ConfigError(
                f"{source}: {key} does not match the rotary embedding of ViT-5 (base {base:g}); use weights of ViT-5."
            )
    return kept


# ---------------------------------------------------------------------------------------------------- registration


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return vit_cfg(crop_pct=1.0, paper_ids="arXiv:2602.08071", **kwargs)


# The weights are at huggingface.co/FengWang3211/ViT-5; they are loaded from a file.
default_cfgs = generate_default_cfgs(
    {
        "vit5_small.untrained": _cfg(),
        "vit5_base.untrained": _cfg(),
        "vit5_large.untrained": _cfg(),
        "vit5_xlarge.untrained": _cfg(),
    }
)


@register_model
def vit5_small(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-S: 22.0 M parameters, 4.7 G MACs, 82.2 % top-1."""
    return build(ViT5, "vit5_small", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def vit5_base(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-B: 86.5 M parameters, 17.9 G MACs, 84.2 % top-1; 85.4 % at 384 pixels."""
    return build(ViT5, "vit5_base", pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)


@register_model
def vit5_large(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-L: 304 M parameters, 62.8 G MACs, 84.9 % top-1; 86.0 % at 384 pixels."""
    return build(ViT5, "vit5_large", pretrained, kwargs, embed_dim=1024, depth=24, num_heads=16)


@register_model
def vit5_xlarge(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-XL: 449 M parameters, 92.4 G MACs; neither results nor a recipe are published."""
    return build(ViT5, "vit5_xlarge", pretrained, kwargs, embed_dim=1152, depth=28, num_heads=16)
