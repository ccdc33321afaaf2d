"""Checkpoint files: reading the common formats, sharded checkpoints, and atomic writing.

This package knows files and state dicts, but no backbones: `models` imports it and offers
`vitrail.models.load_checkpoint`. `writing` imports Lightning, so it is not imported here.
"""

from vitrail.checkpoints.fitting import load_checkpoint
from vitrail.checkpoints.reading import read_checkpoint

__all__ = ["load_checkpoint", "read_checkpoint"]
