"""The cosine schedule of the papers (Loshchilov and Hutter, arXiv:1608.03983), as timm computes it."""

import logging
from dataclasses import InitVar, dataclass

import torch
from timm.scheduler import CosineLRScheduler

from vitrail.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, cosine, cooldown.

    The cosine's clock starts at epoch 0, so the first epoch after the warm-up is slightly below the peak, as in DeiT,
    T2T-ViT and LV-ViT; with `warmup_prefix` it starts at the peak after the warm-up, as in Google's trainings.

    Attributes:
        warmup_epochs: length of the warm-up.
        warmup_lr: learning rate that it starts from, not scaled with the batch.
        min_lr: learning rate at the end of the cosine and during the cooldown, not scaled with the batch.
        cooldown_epochs: epochs at `min_lr` at the end; the cosine takes the others.
        per_step: change the rate after each optimiser step rather than after each epoch.
        warmup_prefix: let the cosine begin after the warm-up.
        epoch_lag: give each epoch the rate of the one before it, as DeiT's and DeiT-III's code does: epochs 0
            and 1 both run at `warmup_lr`.
        late: the earlier name of `epoch_lag`, for code.

    Raises:
        ConfigError: `epoch_lag` with `per_step`, which no recipe combines.
    """

    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 0
    per_step: bool = False
    warmup_prefix: bool = False
    epoch_lag: bool = False
    late: InitVar[bool] = False

    def __post_init__(self, late: bool) -> None:
        if late:
            object.__setattr__(self, "epoch_lag", True)
        if self.epoch_lag and self.per_step:
            raise ConfigError("schedule.epoch_lag=true: counts epochs; set schedule.per_step=false.")

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
        warmup = round(warmup_epochs * unit)
        return CosineLRScheduler(
            optimizer,
            t_initial=cosine_epochs * unit - (warmup if self.warmup_prefix else 0),
            lr_min=self.min_lr,
            warmup_t=warmup,
            warmup_prefix=self.warmup_prefix,
            warmup_lr_init=self.warmup_lr,
            t_in_epochs=not self.per_step,
        )

    def advance(self, scheduler: CosineLRScheduler, epochs: int, steps: int) -> None:
        """Set the rate for what comes after `epochs` whole epochs and `steps` optimiser steps."""
        scheduler.step(max(0, epochs - 1) if self.epoch_lag else epochs)
        scheduler.step_update(steps)
