"""Callback for training in phases of image size."""

import logging
from typing import Any

import lightning as L

from vitrail.data.phases import Phase, Phases

log = logging.getLogger(__name__)


class PhaseReport(L.Callback):
    """Callback that logs each phase as it begins, and `train/image_size`, the height in pixels, per epoch.

    It also checks that every training batch has the image size of its epoch.

    Args:
        phases: phases of the training.
    """

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self._logged: Phase | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the batch, and log its phase if it is a new one."""
        phase = self.phases.at(trainer.current_epoch)
        size = (batch.image.shape[-2], batch.image.shape[-1])
        assert size == phase.size, f"images of {size} pixels in a phase of {phase.size}"
        if phase != self._logged and trainer.is_global_zero:
            magnitude = "" if phase.magnitude is None else f", RandAugment magnitude {phase.magnitude}"
            log.info("%d x %d px%s, until epoch %d", *phase.size, magnitude, phase.end)
        self._logged = phase

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the image size."""
        height = float(self.phases.at(trainer.current_epoch).size[0])
        pl_module.log("train/image_size", height, sync_dist=True, batch_size=1)
