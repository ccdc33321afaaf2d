"""vitrail trains vision transformers; importing it registers every backbone with timm."""

from vitrail import models

__version__ = "0.1.0"
__all__ = ["__version__", "models"]
