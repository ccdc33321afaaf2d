"""Checkpoint files: reading everybody's formats, shards of several processes, and writing whole or not at all.

The room knows files and state dicts, no network: `models` builds on it, so that `vitrail.models.load_checkpoint` can
stay where users look for it. `writing` imports Lightning, so it is not imported here.
"""

from vitrail.checkpoints.reading import load_checkpoint, read_checkpoint

__all__ = ["load_checkpoint", "read_checkpoint"]
