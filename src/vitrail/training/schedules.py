"""The cosine schedule of the papers (Loshchilov and Hutter, arXiv:1608.03983), as timm computes it."""

import logging
from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler

from vitrail.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, cosine, cooldown.

    The warm-up is not a prefix: the cosine's clock starts at epoch 0, so the first epoch after the warm-up is slightly
    below the peak, as in DeiT, T2T-ViT and LV-ViT.

    Attributes:
        warmup_epochs: length of the warm-up.
        warmup_lr: learning rate that it starts from, not scaled with the batch.
        min_lr: learning rate at the end of the cosine and during the cooldown, not scaled with the batch.
        cooldown_epochs: epochs at `min_lr` at the end; the cosine takes the others.
        per_step: change the rate after each optimiser step rather than after each epoch.
    """

    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 0
    per_step: bool = False

    def build(self, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int) -> CosineLRScheduler:
        """The scheduler for a training of `epochs` epochs in all.

        Raises:
            ConfigError: nothing is left for the cosine.
        """
        cosine_epochs = epochs - self.cooldown_epochs
        if cosine_epochs <= 0:
            raise ConfigError(f"schedule.cooldown_epochs={self.cooldown_epochs}: leaves none of {epochs} epochs.")
        warmup_epochs = self.warmup_epochs
        if warmup_epochs >= cosine_epochs:
            warmup_epochs = cosine_epochs / 2
            log.warning(
                "schedule.warmup_epochs=%g does not fit into %d epochs: warming up for %g.",
                self.warmup_epochs,
                cosine_epochs,
                warmup_epochs,
            )
        unit = steps_per_epoch if self.per_step else 1
        return CosineLRScheduler(
            optimizer,
            t_initial=cosine_epochs * unit,
            lr_min=self.min_lr,
            warmup_t=round(warmup_epochs * unit),
            warmup_lr_init=self.warmup_lr,
            t_in_epochs=not self.per_step,
        )
