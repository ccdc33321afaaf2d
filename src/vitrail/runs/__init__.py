"""Everything around a training: configs, run directories, loggers, preemption, resuming and reproduction.

Only this package and `vitrail.commands` import Hydra.
"""

from vitrail.runs.config import compose
from vitrail.runs.trained import load_run
from vitrail.runs.trained_model import TrainedModel

__all__ = ["TrainedModel", "compose", "load_run"]
