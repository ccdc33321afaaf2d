"""Networks as the papers draw them, registered with timm; torch and timm only."""

from vitrail.models import lv_vit, t2t_vit, vit
from vitrail.models.checkpoints import load_checkpoint
from vitrail.models.factory import create_model
from vitrail.models.heads import forward_heads
from vitrail.types import Heads

__all__ = ["Heads", "create_model", "forward_heads", "load_checkpoint", "lv_vit", "t2t_vit", "vit"]
