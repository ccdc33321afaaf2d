"""Helpers to register a ViT with timm: its pretrained configuration, and the call that builds it."""

from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from vitrail.checkpoints.fitting import checkpoint_filter

Backbone = TypeVar("Backbone", bound=nn.Module)


def vit_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return timm's `default_cfg` of a ViT with fixed input size: ImageNet-1k at 224 pixels, updated with `kwargs`."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def build(
    model_class: type[Backbone], variant: str, pretrained: bool, kwargs: dict[str, Any], **architecture: Any
) -> Backbone:
    """Build `variant` with timm's builder; the user's `kwargs` take precedence over `architecture`."""
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**architecture, **kwargs},
    )
