"""What surrounds a training: run directories, configs to objects, loggers, preemption, resume, reproduction.

This room and `commands` are the only ones that know Hydra.
"""

from vitrail.runs.config import compose
from vitrail.runs.trained import TrainedModel, load_run

__all__ = ["TrainedModel", "compose", "load_run"]
