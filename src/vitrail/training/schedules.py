"""Learning rate schedules, on timm's schedulers: the cosine (Loshchilov and Hutter, arXiv:1608.03983), and the linear
one of segmentation."""

import logging
from collections.abc import Callable
from dataclasses import InitVar, dataclass

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler

from vitrail.errors import ConfigError
from vitrail_runtime.checking import NonNegative, NonNegativeInt, Positive, Share, checked

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class CosineSchedule:
    """Learning rate schedule: linear warm-up, cosine, cooldown.

    The cosine is counted from epoch 0, so that the first epoch after the warm-up is slightly below the peak, as in
    DeiT, T2T-ViT and LV-ViT. With `warmup_prefix` the cosine is counted from the end of the warm-up and starts at the
    peak, as in Google's code.

    Attributes:
        warmup_epochs: length of the warm-up.
        warmup_lr: learning rate at the start of the warm-up, not scaled with the batch size.
        min_lr: learning rate at the end of the cosine and during the cooldown, not scaled with the batch size.
        cooldown_epochs: epochs at `min_lr` at the end; the cosine covers the other epochs.
        per_step: change the learning rate after each optimiser step rather than after each epoch.
        warmup_prefix: start the cosine after the warm-up.
        warmup_reaches_peak: the last step of the warm-up runs at the peak, as does the first one after it (DynamicViT).
            Otherwise it runs one step below. Needs `per_step` and `warmup_prefix`.
        epoch_lag: use the learning rate of the previous epoch, as DeiT's and DeiT-III's code does: epochs 0 and 1 both
            run at `warmup_lr`.
        late: deprecated name of `epoch_lag`, for Python code.

    Raises:
        ConfigError: `options are set that do not fit together.
    """

    warmup_epochs: NonNegative = 5
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5
    cooldown_epochs: NonNegativeInt = 0
    per_step: bool = False
    warmup_prefix: bool = False
    warmup_reaches_peak: bool = False
    epoch_lag: bool = False
    late: InitVar[bool] = False

    def __post_init__(self, late: bool) -> None:
        if late:
            object.__setattr__(self, "epoch_lag", True)
        if self.epoch_lag and self.per_step:
            raise ConfigError("schedule.epoch_lag=true: needs a per-epoch schedule; set schedule.per_step=false.")
        if self.warmup_reaches_peak and not (self.per_step and self.warmup_prefix):
            raise ConfigError(
                "schedule.warmup_reaches_peak=true: needs schedule.per_step=true and schedule.warmup_prefix=true."
            )

    def build(self, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int) -> CosineLRScheduler:
        """Build timm's scheduler for a training of `epochs` epochs in total.

        Raises:
            ConfigError: the cooldown leaves no epoch for the cosine.
        """
        cosine_epochs = epochs - self.cooldown_epochs
        if cosine_epochs <= 0:
            raise ConfigError(
                f"schedule.cooldown_epochs={self.cooldown_epochs}: leaves none of the {epochs} epochs for the cosine;"
                " lower it or raise epochs."
            )
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
            warmup_t=max(0, warmup - self.warmup_reaches_peak),
            warmup_prefix=self.warmup_prefix,
            warmup_lr_init=self.warmup_lr,
            t_in_epochs=not self.per_step,
        )

    def advance(self, scheduler: CosineLRScheduler, epochs: float, steps: float) -> None:
        """Set the learning rate of the step after `epochs` finished epochs and `steps` optimiser steps."""
        if self.warmup_reaches_peak and steps > scheduler.warmup_t:
            steps -= 1  # the peak lasts for two steps
        scheduler.step(max(0, epochs - 1) if self.epoch_lag else epochs)
        scheduler.step_update(steps)


@checked
@dataclass(frozen=True)
class LinearSchedule:
    """Learning rate schedule in steps: polynomial decay to `min_lr`, multiplied by a linear warm-up.

    The values are those of mmcv's "poly" policy with linear warm-up: at step t of T, with a warm-up of W steps, the
    peak is multiplied by (1 - t / T)^power and, for t < W, by 1 - (1 - t / W) (1 - warmup_ratio).

    Attributes:
        warmup_steps: length of the warm-up in optimiser steps.
        warmup_ratio: factor of the learning rate at step 0.
        power: exponent; 1 is linear.
        min_lr: learning rate at the end.
    """

    warmup_steps: NonNegativeInt = 1500
    warmup_ratio: Share = 1e-6
    power: Positive = 1.0
    min_lr: NonNegative = 0.0

    per_step = True

    def build(self, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int) -> PolyLRScheduler:
        """Build the scheduler for a training of `epochs` epochs in total."""
        steps, warmup = max(1, epochs * steps_per_epoch), self.warmup_steps
        if warmup >= steps:
            warmup = steps // 2
            log.warning(
                "schedule.warmup_steps=%d does not fit into %d steps: warming up for %d.",
                self.warmup_steps,
                steps,
                warmup,
            )
        return _WarmPoly(optimizer, steps, warmup, self)

    def advance(self, scheduler: PolyLRScheduler, epochs: float, steps: float) -> None:
        """Set the learning rate of the step after `steps` optimiser steps."""
        scheduler.step_update(steps)


class _WarmPoly(PolyLRScheduler):
    """timm's polynomial decay, with mmcv's warm-up, which multiplies the decayed learning rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: int, schedule: LinearSchedule) -> None:
        super().__init__(optimizer, steps, schedule.power, schedule.min_lr, t_in_epochs=False)
        self.mmcv_warmup, self.warmup_ratio = warmup, schedule.warmup_ratio
        self.step_update(0)

    def _get_lr(self, t: float) -> list[float]:
        rates = super()._get_lr(t)
        if t >= self.mmcv_warmup:
            return rates
        factor = 1 - (1 - t / self.mmcv_warmup) * (1 - self.warmup_ratio)
        return [rate * factor for rate in rates]


def epoch_rates(
    schedule: CosineSchedule | LinearSchedule,
    peak: float,
    epochs: int,
    steps: int,
    position: Callable[[float], float] | None = None,
) -> list[float]:
    """Return the learning rate in the middle of each epoch, or for all of it if the schedule is not per step.

    Args:
        schedule: the schedule.
        peak: learning rate of the optimiser.
        epochs: number of epochs.
        steps: optimiser steps per epoch.
        position: maps epochs since the start to epochs of the schedule, for training in phases.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = schedule.build(optimizer, epochs, steps_per_epoch=steps)
    rates = []
    for epoch in range(epochs):
        begin, middle = (float(at) if position is None else position(at) for at in (epoch, epoch + 0.5))
        schedule.advance(scheduler, begin, steps * middle)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates
