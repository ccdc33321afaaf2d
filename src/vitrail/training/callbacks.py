"""Callbacks that measure throughput, and show and report the progress."""

import logging
import time
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar

from vitrail.training.peaks import operations_per_image, peak_operations
from vitrail_runtime.checking import NonNegative, checked

log = logging.getLogger(__name__)


@checked
class SpeedMonitor(L.Callback):
    """Callback that logs the training throughput of each epoch.

    `speed/images_per_second` counts all devices; its time includes waiting for data, but not validation.
    `speed/data_wait` is the share of that time, in %, that a device waited between two steps: for the data loader, and
    on a GPU also for copies and rendering. It is averaged over devices. `speed/gpu_memory` is the peak in GiB.
    `speed/share_of_peak` is the share, in %, of the operations per second that the GPUs can reach at this precision,
    for GPUs whose peak is known (`vitrail.training.peaks`).
    """

    def __init__(self) -> None:
        self.peak: float | None = None
        self.operations: dict[tuple[int, int], int | None] = {}
        """Operations of a step for one image, by the image's (height, width); empty if the peak is not known."""
        self.size = (0, 0)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Count the operations of a step, before a strategy shards the network, if the GPU's peak is known."""
        self.peak = peak_operations(trainer.strategy.root_device, str(trainer.precision)) if stage == "fit" else None
        if self.peak is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            phases = pl_module.phases
            sizes = [phase.size for phase in phases.phases] if phases else [data.input.size] if data else []
            self.operations = {size: operations_per_image(pl_module, size) for size in sizes}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed training may start in the middle of an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the counters and start the clock."""
        self.images = 0
        self.clock = DeviceClock() if pl_module.device.type == "cuda" else HostClock()
        self.clock.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the last step, which was spent waiting for this batch."""
        self.clock.stop()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images; the clock of an epoch stops at its last batch, before validation."""
        self.images += len(batch.image) * trainer.world_size
        self.size = (batch.image.shape[-2], batch.image.shape[-1])
        self.clock.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log throughput, data wait and peak memory."""
        waited, seconds = self.clock.read()
        seconds = max(seconds, 1e-9)
        figures = {"images_per_second": self.images / seconds, "data_wait": 100 * waited / seconds}
        if torch.cuda.is_available():
            figures["gpu_memory"] = torch.cuda.max_memory_allocated() / 2**30
        if self.peak and (operations := self.operations.get(self.size)):
            reached = operations * figures["images_per_second"] / trainer.world_size
            figures["share_of_peak"] = 100 * reached / self.peak
        pl_module.log_dict({f"speed/{name}": value for name, value in figures.items()}, sync_dist=True, batch_size=1)


class HostClock:
    """Clock of the intervals between `start` and `stop`, by the host's time."""

    def __init__(self) -> None:
        self.total = 0.0
        self.first: Any = None
        self.last: Any = None

    def start(self) -> None:
        """Start an interval."""
        self.last = self._now()
        if self.first is None:
            self.first = self.last

    def stop(self) -> None:
        """End the interval."""
        self.total += self._now() - self.last

    def read(self) -> tuple[float, float]:
        """Return the seconds in all intervals, and those from the first start to the last one."""
        return self.total, self.last - self.first

    @staticmethod
    def _now() -> Any:
        return time.perf_counter()


class DeviceClock(HostClock):
    """Clock of the intervals between `start` and `stop` as the GPU reaches them, which may be later than the host."""

    def __init__(self) -> None:
        super().__init__()
        self.intervals: deque[tuple[Any, Any]] = deque()

    def stop(self) -> None:
        """End the interval; add up those that the GPU has passed."""
        self.intervals.append((self.last, self._now()))
        while self.intervals and self.intervals[0][1].query():
            self._add(*self.intervals.popleft())

    def read(self) -> tuple[float, float]:
        """Return the seconds in all intervals, and those from the first start to the last one."""
        self.last.synchronize()
        while self.intervals:
            self._add(*self.intervals.popleft())
        return self.total, self.first.elapsed_time(self.last) / 1e3

    def _add(self, start: Any, end: Any) -> None:
        self.total += start.elapsed_time(end) / 1e3

    @staticmethod
    def _now() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@checked
class IntervalProgressBar(RichProgressBar):
    """Lightning's progress bar, drawn at most once per interval.

    Lightning's own collects and formats all metrics at every batch, which takes longer than launching a small step.

    Args:
        leave: keep each epoch's bar on screen.
        interval: seconds between two updates.
    """

    def __init__(self, leave: bool = False, interval: NonNegative = 0.5) -> None:
        super().__init__(leave=leave)
        self.interval, self._next = interval, 0.0

    def _is_due(self, batches: float, batch_idx: int) -> bool:
        """Return whether to draw the bar now: at the end of each interval, and at the last batch."""
        now = time.monotonic()
        if now < self._next and batch_idx + 1 != batches:
            return False
        self._next = now + self.interval
        return True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the finished batch and the metrics, if the bar is due."""
        if self.is_enabled and self._is_due(self.total_train_batches, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the finished batch, if the bar is due."""
        if self.is_enabled and self._is_due(self.total_val_batches_current_dataloader, batch_idx):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)


@checked
class EpochReport(L.Callback):
    """Callback that writes one line per epoch to the terminal and the run's log file."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's metrics; this runs after the other callbacks have logged theirs."""
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        for text, key in (
            ("loss {:.4f}", "train/loss"),
            ("top-1 {:.2f} %", "val/top1"),
            ("EMA {:.2f} %", "val/top1_ema"),
            ("mIoU {:.2f} %", "val/mIoU"),
            ("EMA {:.2f} %", "val/mIoU_ema"),
            ("lr {:.2e}", "train/lr"),
            ("{:,.0f} images/s", "speed/images_per_second"),
        ):
            if key in metrics:
                parts.append(text.format(metrics[key]))
        log.info(", ".join(parts))
