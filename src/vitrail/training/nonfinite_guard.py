"""Numbers going bad: a loss or gradient that is no number is caught before the optimiser uses it."""

import logging
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from vitrail.checkpoints.shards import gathered, local
from vitrail.data.randomness import reseed
from vitrail.errors import ConfigError, TrainingError
from vitrail.models import forward_heads
from vitrail.training.classifier import ImageClassifier
from vitrail.training.ema import EMA
from vitrail.training.targets import TargetBuilder
from vitrail.types import Batch

log = logging.getLogger(__name__)


class NonfiniteGuard(L.Callback):
    """Look at the loss and at the norm of the gradient of every optimiser step, on all processes alike.

    Where one is NaN or infinite, the module that gave the first such number is named, and `path` keeps what it takes to
    see it again: batches, random key, weights. Then, as `on_bad` says:

    - `stop`: the training ends.
    - `skip`: the step is left out, as are its traces in BatchNorm's statistics.
    - `rollback`: weights, average and moments return to the last checkpoint; the data goes on, and from there every
      learning rate is `factor` times what the schedule says.

    With fp16's loss scaling, which finds its scale by such steps, only the loss is looked at.

    Args:
        path: file.
        last: checkpoint to return to.
        on_bad: what to do.
        limit: steps left out in a row, or returns in all, before the training ends nevertheless.
        factor: of the learning rate after a return.
    """

    def __init__(
        self,
        path: str | Path,
        last: str | Path,
        on_bad: Literal["stop", "skip", "rollback"] = "stop",
        limit: int = 3,
        factor: float = 0.5,
    ) -> None:
        if on_bad not in ("stop", "skip", "rollback"):
            raise ConfigError(f"callbacks.nonfinite_guard.on_bad={on_bad}: choose stop, skip or rollback.")
        if not 0 < factor <= 1:
            raise ConfigError(f"callbacks.nonfinite_guard.factor={factor}: must lie in (0, 1].")
        self.path, self.last, self.on_bad, self.limit, self.factor = Path(path), Path(last), on_bad, limit, factor
        self.in_a_row, self.skipped, self.returns, self.lr_scale = 0, 0, 0, 1.0
        self._batches: list[tuple[Any, tuple[int, ...]]] = []  # of the coming step, each with its random key
        self._statistics: list[Tensor] = []
        self._loss = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Counts, and what became of the learning rate."""
        return {"skipped": self.skipped, "returns": self.returns, "lr_scale": self.lr_scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a resumed training."""
        self.skipped, self.returns = state_dict["skipped"], state_dict["returns"]
        self.lr_scale = state_dict["lr_scale"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a lowered learning rate low."""
        if self.lr_scale != 1:
            _scale_rates(trainer, self.lr_scale)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the step is made of."""
        if not self._batches and self.on_bad == "skip":
            self._statistics = [buffer.clone() for buffer in pl_module.model.buffers()]
        self._batches.append((batch, pl_module.batch_key()))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the loss."""
        self._loss = self._loss + loss.detach()  # type: ignore[assignment]

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look, and act."""
        batches, self._batches = self._batches, []
        loss, self._loss = torch.as_tensor(self._loss, dtype=torch.float32), 0.0
        grads = [parameter.grad for parameter in pl_module.model.parameters() if parameter.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        norm = torch.zeros(()) if scaled else gathered(nn.utils.get_total_norm(grads)).float()
        worst = loss.to(pl_module.device) + norm.to(pl_module.device)  # NaN or infinite if either is
        if trainer.world_size > 1:
            worst = torch.nan_to_num(worst, math.inf, math.inf, math.inf).abs()
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        if math.isfinite(worst.item()):
            self.in_a_row = 0
            return
        self._act(trainer, pl_module, self._describe(trainer, pl_module, batches, float(loss)))

    def _describe(
        self, trainer: L.Trainer, pl_module: ImageClassifier, batches: list[tuple[Any, tuple[int, ...]]], loss: float
    ) -> str:
        """What happened where; keeps it in the file."""
        what = f"a loss of {loss}" if not math.isfinite(loss) else "a gradient that is not finite"
        where = first_bad(pl_module, batches, trainer.precision_plugin.forward_context)
        weights = {name: gathered(tensor) for name, tensor in pl_module.model.state_dict().items()}
        path = self.path
        if trainer.global_rank:
            path = path.with_stem(f"{path.stem}_rank{trainer.global_rank}")
        if trainer.is_global_zero or not math.isfinite(loss):
            classes = pl_module.num_classes
            kept = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "batches": [{**_plain(batch, classes), "random_key": list(key)} for batch, key in batches],
                "weights": weights,
            }
            torch.save(kept, path)
        return f"epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}: {what}, first in {where}"

    def _act(self, trainer: L.Trainer, pl_module: ImageClassifier, sentence: str) -> None:
        kept = f"{sentence}; kept in {self.path}"
        if self.on_bad == "stop":
            raise TrainingError(f"{kept}. callbacks.nonfinite_guard.on_bad=skip or rollback goes on.")
        if self.on_bad == "skip":
            self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
            if self.in_a_row > self.limit:
                raise TrainingError(f"{kept}. {self.limit} steps in a row were left out before.")
            log.warning("%s. Step left out, the %d. of this training.", kept, self.skipped)
            for buffer, before in zip(pl_module.model.buffers(), self._statistics, strict=True):
                buffer.copy_(before)
        else:
            self.returns += 1
            if self.returns > self.limit:
                raise TrainingError(f"{kept}. The training had returned {self.limit} times before.")
            if not self.last.is_file():
                raise TrainingError(f"{kept}. There is no checkpoint yet to return to.")
            self.lr_scale *= self.factor
            self._return(trainer, pl_module)
            log.warning("%s. Back to %s, learning rate times %g.", kept, self.last, self.lr_scale)
        pl_module.zero_grad(set_to_none=True)

    def _return(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:
        """Take weights, average and moments out of the last checkpoint, and lower the learning rate."""
        trainer.strategy.checkpoint_io.teardown()  # the first process may be writing
        trainer.strategy.barrier("rollback")
        checkpoint = trainer.strategy.load_checkpoint(self.last, weights_only=True)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        if averages and "averaging_state" in checkpoint:
            averages[0].on_load_checkpoint(trainer, pl_module, checkpoint)
        else:
            pl_module.load_state_dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))
        optimizer = trainer.optimizers[0]
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        _scale_rates(trainer, self.factor)


def _scale_rates(trainer: L.Trainer, factor: float) -> None:
    """Multiply the learning rate, now and all that timm's schedule will give."""
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        scheduler.base_values = [factor * value for value in scheduler.base_values]
        scheduler.warmup_steps = [factor * value for value in scheduler.warmup_steps]
        scheduler.warmup_lr_init *= factor
        scheduler.lr_min *= factor


def _plain(batch: Batch, num_classes: int) -> dict[str, Any]:
    """A batch as dicts, lists and tensors, which load without trust."""
    parts: dict[str, Any] = {"image": batch.image, "label": batch.label, "key": list(batch.key)}
    if batch.mix is not None:
        parts["mixed_label"] = TargetBuilder.class_labels(batch, num_classes)
    if batch.label_map is not None:
        parts["label_map"] = dict(zip(("scores", "classes", "box", "flipped"), batch.label_map, strict=True))
    return parts


@torch.no_grad()
def first_bad(module: ImageClassifier, batches: list[tuple[Any, tuple[int, ...]]], context: Any) -> str:
    """Where the first number that is not finite comes from: a weight, the images, a module, the loss or a gradient.

    Every process computes every batch, whatever it has found: a sharded model needs them all.
    """
    found = [
        f"the weight {name}, which was so before this step"
        for name, parameter in module.model.named_parameters()
        if _is_bad(parameter)
    ]

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            if any(isinstance(part, Tensor) and not part.isfinite().all() for part in outputs):
                found.append(f"the output of {name}")

        return hook

    grads = {name: _is_bad(parameter.grad) for name, parameter in module.model.named_parameters()}
    buffers = [buffer.clone() for buffer in module.model.buffers()]
    for batch, key in batches:
        if not batch.image.isfinite().all():
            bad = [name for name, image in zip(batch.key, batch.image, strict=True) if not image.isfinite().all()]
            found.append(f"the images {', '.join(bad[:3])}")
        handles = [part.register_forward_hook(look(name)) for name, part in module.model.named_modules() if name]
        reseed(*key)  # the same dropout and drop path
        with context():
            forward_heads(module.model, batch.image)
        for handle in handles:
            handle.remove()
    for buffer, before in zip(module.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if found:
        return found[0]
    named = [name for name, bad in grads.items() if bad]
    return f"the gradient of {named[-1]}" if named else "the loss"


def _is_bad(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(local(tensor).isfinite().all())
