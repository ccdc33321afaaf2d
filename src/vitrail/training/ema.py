"""Exponential moving average of the weights, measured beside the raw ones."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.training.classifier import ImageClassifier


class EMA(WeightAveraging):
    """Lightning's weight averaging with a decay that warms up, and both weights validated on the same batches.

    A decay for long trainings (.9999 and more) keeps the random start for thousands of steps, and the average near
    0 % for the first epochs. Here the decay after t updates is min(decay, (1 + t) / (10 + t)), as in TensorFlow's
    ExponentialMovingAverage; a long training is at its full decay after 10 / (1 - decay) steps.

    In a checkpoint `state_dict` holds the average and `current_model_state` the raw weights (Lightning's layout).
    Logs `val/loss_ema`, `val/top1_ema`, `val/top5_ema`.

    Args:
        decay: of the average per optimiser step.
        warmup: let the decay warm up; False starts with it, as DeiT, T2T-ViT and LV-ViT did.
        device: where the average is kept; None keeps it beside the model, `cpu` saves device memory.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.ema.decay={decay}: must lie in [0, 1).")
        super().__init__(device=device, use_buffers=True, multi_avg_fn=self._average)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        updates = int(count)
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:  # counters of BatchNorm
            torch._foreach_copy_(averaged, current)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the model; at this point it is still on the CPU, so its device is asked of the strategy."""
        if self._device is None:
            self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @property
    def average(self) -> ImageClassifier:
        """The module with the averaged weights."""
        assert self._average_model is not None
        return self._average_model.module  # type: ignore[return-value]

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Instead of swapping the weights, measure the average as well."""
        if self._average_model is not None:
            self.average.eval()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch with the averaged weights."""
        if self._average_model is not None:
            with trainer.precision_plugin.val_step_context():
                self.average.update_metrics(_to(batch, self.average))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the average's metrics of all processes together."""
        if self._average_model is not None:
            metrics = self.average.compute_metrics("val/")
            pl_module.log_dict({f"{name}_ema": value for name, value in metrics.items()}, sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights in the module: the checkpoint holds both."""


def _to(batch: Any, module: ImageClassifier) -> Any:
    device = next(module.parameters()).device
    return batch._replace(image=batch.image.to(device), label=batch.label.to(device))
