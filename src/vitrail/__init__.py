"""vitrail trains vision transformers; importing it registers every backbone with timm."""

from typing import TYPE_CHECKING

from vitrail import models
from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.runs.trained import load_run  # needs Lightning and Hydra, which backbones alone do not
else:
    __getattr__, __dir__ = lazy_names(__name__)

__version__ = "0.2.0"
__all__ = ["__version__", "load_run", "models"]
