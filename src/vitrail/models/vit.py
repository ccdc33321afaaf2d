"""Small ViTs and DeiTs for small images, and the plain ViT-S/16; timm has the other published sizes.

`vit_nano` is a ViT with a convolutional stem, ViT_C of "Early Convolutions Help Transformers See
Better" (Xiao et al., arXiv:2106.14881), with mean pooling instead of a class token (Beyer et al., arXiv:2205.01580);
the stem uses LayerNorm instead of BatchNorm, so that results do not depend on how a batch is split over processes.
`deit_nano` is a small DeiT with patches of 4 pixels and a class token; `deit_nano_distilled` adds the distillation
token (Touvron et al., arXiv:2012.12877). No paper has results for these sizes.

`vit_plain_small_patch16_224` is the ViT-S/16 of "Better plain ViT baselines for ImageNet-1k" (Beyer et al.,
arXiv:2205.01580; github.com/google-research/big_vision, `configs/vit_s16_i1k.py`): no class token, fixed 2-D sine
positions, final norm before mean pooling, a classifier initialised to zero.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from vitrail.models.registry import build, vit_cfg


def _cfg(**kwargs: Any) -> dict[str, Any]:
    half = (0.5, 0.5, 0.5)
    return vit_cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, mean=half, std=half, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "vit_nano.untrained": _cfg(first_conv="patch_embed.backbone.0.conv"),
        "deit_nano.untrained": _cfg(),
        "vit_plain_small_patch16_224.untrained": vit_cfg(
            input_size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        "deit_nano_distilled.untrained": _cfg(classifier=("head", "head_dist")),
    }
)

_NANO = {"img_size": 32, "embed_dim": 64, "depth": 4, "num_heads": 2}


@register_model
def vit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-nano, 0.2 M parameters: three convolutions of stride 2, width 64, depth 4, mean pooling.

    A 32-pixel image gives 16 tokens; sides that are not a multiple of 8 are rounded up.
    """
    stem = ConvStem(in_chans=kwargs.get("in_chans", 3), depth=3, channels=(16, 32, 64), norm_layer="layernorm2d")
    config = {
        **_NANO,
        "patch_size": 1,  # of the stem's output
        "embed_layer": partial(HybridEmbed, backbone=stem, proj=True),
        "global_pool": "avg",
        "class_token": False,
    }
    return build(VisionTransformer, "vit_nano", pretrained, kwargs, **config)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return the position table (1, rows * columns, width): a quarter each of sin x, cos x, sin y and cos y, in cells.

    The frequencies decrease geometrically from 1 to 1 / 10,000, both included (MoCo v3, arXiv:2104.02057).
    """
    frequencies = 10_000 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (x, x, y, y)]
    parts = [wave(angle) for wave, angle in zip((torch.sin, torch.cos) * 2, angles, strict=True)]
    return torch.cat(parts, 1)[None].float()


class PlainViT(VisionTransformer):
    """timm's ViT with a fixed sine position table, for any image size."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._fix_positions()
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def _fix_positions(self) -> None:
        rows, columns = self.patch_embed.grid_size
        del self.pos_embed
        self.register_buffer("pos_embed", sine_positions(rows, columns, self.embed_dim))

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Change the image size, and recompute the position table for it."""
        super().set_input_size(*args, **kwargs)
        self._fix_positions()


@register_model
def vit_plain_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> PlainViT:
    """ViT-S/16 of big_vision's ImageNet-1k baseline, 22 M parameters, 76.5 % top-1 after 90 epochs."""
    size = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    plain = {"class_token": False, "global_pool": "avg", "fc_norm": False, "weight_init": "jax"}
    return build(PlainViT, "vit_plain_small_patch16_224", pretrained, kwargs, **size, **plain)


@register_model
def deit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-nano, 0.2 M parameters: patches of 4 pixels, width 64, depth 4, class token."""
    return build(VisionTransformer, "deit_nano", pretrained, kwargs, **_NANO, patch_size=4)


@register_model
def deit_nano_distilled(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-nano with a distillation token and its head."""
    return build(VisionTransformerDistilled, "deit_nano_distilled", pretrained, kwargs, **_NANO, patch_size=4)
