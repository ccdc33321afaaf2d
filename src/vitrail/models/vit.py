"""ViT and DeiT at a size for small images; the published sizes are timm's own classes.

`vit_nano` is the plain ViT of "Better plain ViT baselines for ImageNet-1k" (Beyer et al., arXiv:2205.01580) made small:
mean pooling and no class token. `deit_nano` keeps DeiT's class token, and `deit_nano_distilled` adds its distillation
token (Touvron et al., arXiv:2012.12877). They are ours: no paper has results for them.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn


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
        "vit_nano.untrained": _cfg(),
        "deit_nano.untrained": _cfg(),
        "deit_nano_distilled.untrained": _cfg(classifier=("head", "head_dist")),
    }
)

# With patches of 4 pixels a 28-pixel image is 49 tokens: fast enough to train on a laptop.
_NANO = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}


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
    """ViT-nano, 1.2 M parameters: patches of 4 pixels, width 128, depth 6, mean pooling, no class token."""
    config = {**_NANO, "global_pool": "avg", "class_token": False, **kwargs}
    return _create(VisionTransformer, "vit_nano", pretrained, **config)


@register_model
def deit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-nano, 1.2 M parameters: as `vit_nano`, with a class token."""
    return _create(VisionTransformer, "deit_nano", pretrained, **{**_NANO, **kwargs})


@register_model
def deit_nano_distilled(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-nano with a distillation token and its head."""
    return _create(VisionTransformerDistilled, "deit_nano_distilled", pretrained, **{**_NANO, **kwargs})
