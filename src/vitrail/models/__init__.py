"""Backbones, registered with timm; depends on torch and timm only.

All modules of this folder are imported here, so a new backbone is one file with timm's `@register_model`. Packages,
such as `segmentation`, register nothing and are imported when they are used.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from vitrail.checkpoints import load_checkpoint
from vitrail.models.factory import create_model
from vitrail.models.heads import forward_heads
from vitrail.types import Outputs
from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.models.segmentation import linear_segmenter, upernet
else:
    __getattr__, __dir__ = lazy_names(__name__)

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if not _module.ispkg:
        importlib.import_module(_module.name)

__all__ = ["Outputs", "create_model", "forward_heads", "linear_segmenter", "load_checkpoint", "upernet"]
