"""ViT and DeiT at a size for small images; the published sizes are timm's own classes.

`vit_nano` is a ViT whose patches come from a convolutional stem, ViT_C of "Early Convolutions Help Transformers See
Better" (Xiao et al., arXiv:2106.14881), with mean pooling instead of a class token (Beyer et al., arXiv:2205.01580);
the stem's normalisation is LayerNorm instead of BatchNorm, so that a batch may be split over processes.
`deit_nano` is DeiT made small, with patches of 4 pixels and a class token; `deit_nano_distilled` adds its distillation
token (Touvron et al., arXiv:2012.12877). They are ours: no paper has results for them.
"""

from functools import partial
from typing import Any

from timm.layers import HybridEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem

from vitrail.models.registry import build, vit_cfg


def _cfg(**kwargs: Any) -> dict[str, Any]:
    half = (0.5, 0.5, 0.5)
    return vit_cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, mean=half, std=half, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "vit_nano.untrained": _cfg(first_conv="patch_embed.backbone.0.conv"),
        "deit_nano.untrained": _cfg(),
        "deit_nano_distilled.untrained": _cfg(classifier=("head", "head_dist")),
    }
)

_NANO = {"img_size": 32, "embed_dim": 64, "depth": 4, "num_heads": 2}


@register_model
def vit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-nano, 0.2 M parameters: three convolutions of stride 2, width 64, depth 4, mean pooling.

    A 32-pixel image is 16 tokens; sides that are no multiple of 8 are rounded up.
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


@register_model
def deit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-nano, 0.2 M parameters: patches of 4 pixels, width 64, depth 4, class token."""
    return build(VisionTransformer, "deit_nano", pretrained, kwargs, **_NANO, patch_size=4)


@register_model
def deit_nano_distilled(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-nano with a distillation token and its head."""
    return build(VisionTransformerDistilled, "deit_nano_distilled", pretrained, kwargs, **_NANO, patch_size=4)
