"""Callbacks that measure throughput and report each epoch."""

import logging
import time
from typing import Any

import lightning as L
import torch

from vitrail_runtime.checking import checked

log = logging.getLogger(__name__)


@checked
class SpeedMonitor(L.Callback):
    """Callback that logs the training throughput of each epoch.

    `speed/images_per_second` counts all devices; its time includes waiting for data, but not validation.
    `speed/data_wait` is the share of that time, in %, that a device waited for the data loader, averaged over devices.
    `speed/gpu_memory` is the peak in GiB.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed training may start in the middle of an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the counters and start the clock."""
        self.images = 0
        self.waited = 0.0
        self.started = self.ready = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the last step, which was spent waiting for this batch."""
        self.waited += time.perf_counter() - self.ready

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images; the clock of an epoch stops at its last batch, before validation."""
        self.images += len(batch.image) * trainer.world_size
        self.ready = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log throughput, data wait and peak memory."""
        seconds = max(self.ready - self.started, 1e-9)
        figures = {"images_per_second": self.images / seconds, "data_wait": 100 * self.waited / seconds}
        if torch.cuda.is_available():
            figures["gpu_memory"] = torch.cuda.max_memory_allocated() / 2**30
        pl_module.log_dict({f"speed/{name}": value for name, value in figures.items()}, sync_dist=True, batch_size=1)


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
            ("lr {:.2e}", "train/lr"),
            ("{:,.0f} images/s", "speed/images_per_second"),
        ):
            if key in metrics:
                parts.append(text.format(metrics[key]))
        log.info(", ".join(parts))
