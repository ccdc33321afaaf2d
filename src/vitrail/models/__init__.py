"""Networks as the papers draw them, registered with timm; torch and timm only."""

from vitrail.models import vit
from vitrail.models.checkpoints import load_checkpoint
from vitrail.models.factory import create_model, forward_heads
from vitrail.types import Heads

__all__ = ["Heads", "create_model", "forward_heads", "load_checkpoint", "vit"]
