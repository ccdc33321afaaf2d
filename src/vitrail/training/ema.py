"""Exponential moving average (EMA) of the weights, validated together with the raw weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from vitrail.checkpoints.shards import local, shard_like
from vitrail.training.buffers import share_buffers
from vitrail.training.classifier import ImageClassifier
from vitrail_runtime.checking import Rate, checked


@checked
class EMA(L.Callback):
    """Callback that keeps EMA weights and BatchNorm statistics, and validates EMA and raw weights on the same batches.

    With a decay for long training runs (.9999 and more), the random initial weights dominate the EMA for thousands of
    steps, and its accuracy stays near 0 % for the first epochs. The decay is therefore warmed up: after t updates it is
    min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage. It reaches its full value after about
    10 / (1 - decay) steps.

    If a strategy shards the weights, each process keeps the EMA of its shard; Lightning's callback does not support
    this.

    In a checkpoint, `state_dict` holds the EMA weights and `current_model_state` the raw weights (Lightning's layout).
    Logs `val/loss_ema`, `val/top1_ema`, `val/top5_ema`.

    Args:
        decay: EMA decay per optimiser step.
        warmup: warm up the decay; False uses the full decay from the start, as DeiT, T2T-ViT and LV-ViT did.
        device: device of the EMA weights; None keeps them on the model's device, `cpu` saves GPU memory, but every step
            then waits for the GPU and for a copy of all weights.
    """

    def __init__(self, decay: Rate = 0.9999, warmup: bool = True, device: str | None = None) -> None:
        self.decay, self.warmup, self.device = decay, warmup, device
        self.average: dict[str, Tensor] = {}
        """EMA weights by their name in the backbone's state dict; empty until the training starts."""
        self.updates = self._step = 0
        self._pairs: list[_Pair] = []  # looked up once per epoch: a state dict per step would take time

    def on_fit_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Start from the current weights, unless a checkpoint was loaded; the model is on its device by now."""
        self._begin(pl_module)
        if self.device is None:
            now = _state(pl_module.model)
            self.average = {name: tensor.to(now[name].device) for name, tensor in self.average.items()}
        self._pairs = []
        self.metrics: Any = pl_module.new_metrics().to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting at the current step, which is not 0 in a resumed training."""
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look the tensors up again: a backbone may change at the start of an epoch."""
        self._pairs = []

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
        """Update the EMA weights if the batch completed an optimiser step; the first update copies the weights."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self._pairs = self._pairs or self._paired(pl_module.model)
        # The first update copies everything, later ones only BatchNorm's integer counters.
        averaged = [pair for pair in self._pairs if pair.ema.is_floating_point() and self.updates]
        copied = [pair for pair in self._pairs if not (pair.ema.is_floating_point() and self.updates)]
        if averaged:
            averages = [pair.ema for pair in averaged]
            torch._foreach_lerp_(averages, [pair.current.to(pair.ema.device) for pair in averaged], 1 - decay)
        if copied:
            torch._foreach_copy_([pair.ema for pair in copied], [pair.current for pair in copied])
        self.updates += 1

    def _paired(self, model: nn.Module) -> list["_Pair"]:
        """Return this process's part of each EMA tensor, paired with the current tensor."""
        now = _state(model)
        return [_Pair(local(ema), local(now[name])) for name, ema in self.average.items()]

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Load the EMA weights into `model` within the block, and restore the raw weights after it."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        """Exchange the EMA weights with the model's: without copies if both are whole and on the CPU.

        CUDA graphs and sharding strategies need weights to stay where they are in memory.
        """
        pairs = self._paired(model)
        whole = all(local(ema) is ema for ema in self.average.values())
        if whole and all(tensor.device.type == "cpu" for pair in pairs for tensor in pair):
            for pair in {id(pair.current): pair for pair in reversed(pairs)}.values():  # tied weights once
                pair.ema.data, pair.current.data = pair.current.data, pair.ema.data
            return
        pairs = [pair for pair in pairs if pair.current.numel()]
        pairs = list({pair.current.data_ptr(): pair for pair in reversed(pairs)}.values())  # tied weights once
        averages, current = [pair.ema for pair in pairs], [pair.current for pair in pairs]
        kept = [ema.clone() for ema in averages]
        torch._foreach_copy_(averages, current)
        torch._foreach_copy_(current, kept)

    def on_validation_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Measure the statistics that a checkpoint contains, as the module does for the raw weights."""
        share_buffers(self.average[name] for name, _ in pl_module.model.named_buffers() if name in self.average)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: ImageClassifier,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics of the EMA weights with the batch."""
        if not self.average:
            return
        with self.averaged(pl_module.model), trainer.precision_plugin.val_step_context():
            pl_module.measure(batch, self.metrics)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics of the EMA weights over all processes."""
        if self.average:
            values = {f"{name}_ema": value for name, value in self.metrics.compute_and_reset("val/").items()}
            pl_module.log_dict(values, sync_dist=True, batch_size=1)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the EMA weights as `state_dict`, and the raw weights as `current_model_state`."""
        raw = checkpoint["state_dict"]
        checkpoint["current_model_state"] = raw
        checkpoint["state_dict"] = {**raw, **{f"model.{name}": tensor for name, tensor in self.average.items()}}
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.updates)}

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, checkpoint: dict[str, Any]
    ) -> None:
        """Load EMA and raw weights from a checkpoint; without EMA weights in it, both start from its weights."""
        self._begin(pl_module)
        saved = checkpoint["state_dict"]
        with torch.no_grad():
            for name, ema in self.average.items():
                local(ema).copy_(local(shard_like(saved[f"model.{name}"], ema)))
        if "averaging_state" in checkpoint:
            self.updates = int(checkpoint["averaging_state"]["n_averaged"])
            pl_module.load_state_dict(checkpoint["current_model_state"])


class _Pair(NamedTuple):
    ema: Tensor
    current: Tensor


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by their names in the state dict; sharded weights as shards."""
    if reshard := getattr(model, "reshard", None):  # after a forward pass the root module's weights may be unsharded
        reshard()
    return model.state_dict(keep_vars=True)
