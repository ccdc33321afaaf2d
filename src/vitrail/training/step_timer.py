"""Callback that measures what the parts of a training step take, on the clock of the device."""

import time
from typing import Any

import lightning as L
import torch

from vitrail.training.ema import EMA

PARTS = ("data", "forward", "backward", "optimizer", "average", "other")
"""Parts of a step.

`data` is the time between two steps: waiting for the loader, copying, rendering and mixing. `forward` includes targets
and loss, `optimizer` the check of the gradients and clipping, `other` the schedule, logging and all other callbacks.
"""


def moment(device: torch.device) -> Any:
    """Return the current moment on the clock of a device: an event that a GPU has yet to reach, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two moments of one device; waits until it has reached them."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class StepTimer(L.Callback):
    """Callback that measures the parts of `steps` batches, after `warmup` batches.

    `attach` adds it to a trainer. On a GPU it records events, and nothing waits for them.

    Args:
        warmup: batches before the measured ones, at least 1.
        steps: measured batches.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self._moments: list[tuple[str, Any]] = []
        self._recording = False
        self._device = torch.device("cpu")

    def attach(self, trainer: L.Trainer) -> None:
        """Put the timer first among the trainer's callbacks, and marks around the average and at the end."""
        callbacks: Any = [self]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = isinstance(callback, EMA)
            callbacks += [_Mark(self, "other"), callback, _Mark(self, "average")] if average else [callback]
        trainer.callbacks = [*callbacks, _Mark(self, "other", last=True)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the end of each update of the optimiser."""
        self._device = pl_module.device
        optimizer: Any = trainer.optimizers[0]
        base = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead wraps another optimiser
        base.register_step_post_hook(lambda *_: self.mark("optimizer"))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of the wait for the batch."""
        self.mark("data")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Mark the end of the forward pass."""
        self.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the end of the backward pass."""
        self.mark("backward")

    def end_batch(self, batch_idx: int) -> None:
        """Mark the end of a batch; the measurement starts and ends here."""
        self.mark("other")
        if batch_idx + 1 == self.warmup:
            self._recording = True
            self.mark("start")
        elif batch_idx + 1 == self.warmup + self.steps:
            self._recording = False

    def mark(self, part: str) -> None:
        """Record that a part has ended at this moment."""
        if self._recording:
            self._moments.append((part, moment(self._device)))

    def seconds(self) -> dict[str, float]:
        """Return the seconds per batch by part, on average over the measured batches."""
        totals = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in zip(self._moments, self._moments[1:], strict=False):
            totals[part] += seconds_between(start, end)
        return {part: totals[part] / self.steps for part in PARTS}


class _Mark(L.Callback):
    """Callback that marks the end of a part when the callbacks before it have finished a batch."""

    def __init__(self, timer: StepTimer, part: str, last: bool = False) -> None:
        self.timer, self.part, self.last = timer, part, last

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of the part."""
        if self.last:
            self.timer.end_batch(batch_idx)
        else:
            self.timer.mark(self.part)
