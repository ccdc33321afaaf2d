"""Everything around a training: configs, run directories, loggers, preemption, resuming and reproduction.

Only this package and `vitrail.commands` import Hydra.
"""

from vitrail.runs.config import compose
from vitrail.runs.trained import TrainedModel, load_run

__all__ = ["TrainedModel", "compose", "load_run"]
