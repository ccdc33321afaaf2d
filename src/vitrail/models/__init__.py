"""Backbones, registered with timm; depends on torch and timm only.

All modules of this folder are imported here, so a new backbone is one file with timm's `@register_model`.
"""

import importlib
import pkgutil

from vitrail.checkpoints import load_checkpoint
from vitrail.models.factory import create_model
from vitrail.models.heads import forward_heads
from vitrail.models.segmentation import linear_segmenter, upernet
from vitrail.types import Outputs

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["Outputs", "create_model", "forward_heads", "linear_segmenter", "load_checkpoint", "upernet"]
