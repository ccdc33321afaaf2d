"""Everything around a training: configs, run directories, loggers, preemption, resuming and reproduction.

Only this package and `vitrail.commands` import Hydra.
"""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.runs.config import compose
    from vitrail.runs.trained import load_run
    from vitrail.runs.trained_model import TrainedModel
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["TrainedModel", "compose", "load_run"]
