"""Exponential moving average of the weights, measured beside the raw ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vitrail.checkpoints.shards import cut_like, local
from vitrail.errors import ConfigError
from vitrail.training.classifier import ImageClassifier, ValidationMetrics


class EMA(L.Callback):
    """Average the backbone's weights and BatchNorm's statistics, and validate both weights on the same batches.

    A decay for long trainings (.9999 and more) keeps the random start for thousands of steps, and the average near
    0 % for the first epochs. Here the decay after t updates is min(decay, (1 + t) / (10 + t)), as in TensorFlow's
    ExponentialMovingAverage; a long training is at its full decay after 10 / (1 - decay) steps.

    Where a strategy shards the weights, each process averages its shard, which Lightning's own averaging cannot.

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
        self.decay, self.warmup, self.device = decay, warmup, device
        self.average: dict[str, Tensor] = {}
        """By name in the backbone's state dict; what the training has not begun yet lacks."""
        self.updates = self._step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Begin with the weights at hand, unless a checkpoint was read; the model is on its device now."""
        self._begin(pl_module)
        if self.device is None:
            now = _state(pl_module.model)
            self.average = {name: tensor.to(now[name].device) for name, tensor in self.average.items()}
        self.metrics = ValidationMetrics(pl_module.num_classes).to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed training has steps behind it."""
        self._step = trainer.global_step

    def _begin(self, pl_module: ImageClassifier) -> None:
        if not self.average:
            self.average = {
                name: tensor.detach().to(self.device or tensor.device, copy=True)
                for name, tensor in _state(pl_module.model).items()
            }

    @torch.no_grad()
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average where the batch ended an optimiser step; the first update copies."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        floats: tuple[list[Tensor], list[Tensor]] = [], []
        for averaged, current in self._pairs(pl_module.model):
            if averaged.is_floating_point() and self.updates:
                floats[0].append(averaged)
                floats[1].append(current.to(averaged.device))
            else:  # also counters of BatchNorm
                averaged.copy_(current)
        if floats[0]:
            torch._foreach_lerp_(*floats, 1 - decay)
        self.updates += 1

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of each average and of what it is of."""
        now = _state(model)
        return ((local(averaged), local(now[name])) for name, averaged in self.average.items())

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Let `model` have the averaged weights for a while."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for averaged, current in self._pairs(model):
            kept = averaged.clone()
            averaged.copy_(current)
            current.copy_(kept)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: ImageClassifier,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch with the averaged weights."""
        if not self.average:
            return
        with self.averaged(pl_module.model), trainer.precision_plugin.val_step_context():
            self.metrics.update(pl_module(batch.image).float(), batch.label)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the average's metrics of all processes together."""
        if self.average:
            values = {f"{name}_ema": value for name, value in self.metrics.compute_and_reset("val/").items()}
            pl_module.log_dict(values, sync_dist=True, batch_size=1)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average where readers look first, and the raw weights beside it."""
        raw = checkpoint["state_dict"]
        checkpoint["current_model_state"] = raw
        checkpoint["state_dict"] = {**raw, **{f"model.{name}": tensor for name, tensor in self.average.items()}}
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.updates)}

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, checkpoint: dict[str, Any]
    ) -> None:
        """Take average and raw weights from a checkpoint; one without an average gives its weights to both."""
        self._begin(pl_module)
        saved = checkpoint["state_dict"]
        with torch.no_grad():
            for name, averaged in self.average.items():
                local(averaged).copy_(local(cut_like(saved[f"model.{name}"], averaged)))
        if "averaging_state" in checkpoint:
            self.updates = int(checkpoint["averaging_state"]["n_averaged"])
            pl_module.load_state_dict(checkpoint["current_model_state"])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The weights and statistics themselves, not copies; where they are sharded, their shards."""
    if reshard := getattr(model, "reshard", None):  # after a forward pass the outermost may still be whole
        reshard()
    return model.state_dict()
