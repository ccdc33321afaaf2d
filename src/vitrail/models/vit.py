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
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_nano.untrained": _cfg(first_conv="patch_embed.backbone.0.conv"),
        "deit_nano.untrained": _cfg(),
        "deit_nano_distilled.untrained": _cfg(classifier=("head", "head_dist")),
    }
)

_NANO = {"img_size": 32, "embed_dim": 64, "depth": 4, "num_heads": 2}


def _create(model_class: type[VisionTransformer], variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


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
        **kwargs,
    }
    return _create(VisionTransformer, "vit_nano", pretrained, **config)


@register_model
def deit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-nano, 0.2 M parameters: patches of 4 pixels, width 64, depth 4, class token."""
    return _create(VisionTransformer, "deit_nano", pretrained, **{**_NANO, "patch_size": 4, **kwargs})


@register_model
def deit_nano_distilled(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-nano with a distillation token and its head."""
    config = {**_NANO, "patch_size": 4, **kwargs}
    return _create(VisionTransformerDistilled, "deit_nano_distilled", pretrained, **config)
