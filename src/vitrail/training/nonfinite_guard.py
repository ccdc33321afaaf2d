"""Callback that catches a NaN or infinite loss or gradient before the optimiser step."""

import logging
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from vitrail.checkpoints.shards import gathered, local
from vitrail.data.randomness import reseed
from vitrail.errors import TrainingError
from vitrail.models import forward_heads
from vitrail.objectives.contract import trained_parts
from vitrail.training.classifier import ImageClassifier
from vitrail.training.ema import EMA
from vitrail.training.targets import TargetBuilder
from vitrail.training.verdicts import (
    Brake,
    DeviceReader,
    HostReader,
    Step,
    gradients,
    judge,
    restore_if,
    spoil_gradients,
)
from vitrail.types import Batch
from vitrail_runtime.checking import PositiveInt, Range, checked

log = logging.getLogger(__name__)


@checked
class NonfiniteGuard(L.Callback):
    """Callback that checks the loss and the gradients of every optimiser step, on all processes.

    If one of them is NaN or infinite, the callback finds the module that produced the first such number, and saves the
    batches, random key and weights to `path`, so that the step can be reproduced. Then it acts by `on_bad`:

    - `stop`: end the training.
    - `skip`: skip the step and undo its update of BatchNorm's statistics.
    - `rollback`: restore weights, EMA weights and moments from the last checkpoint. The training continues with the
      next batch, and every learning rate of the schedule is multiplied by `factor`.

    On a GPU nothing waits for the check: the device skips the update of a bad step and restores BatchNorm's statistics,
    and the host learns of it and acts one step later (`vitrail.training.verdicts`), or before a checkpoint is saved.

    With fp16 loss scaling, which produces such gradients while it searches for its scale, only the loss is checked.

    Args:
        path: file to save a bad step to.
        last: checkpoint to roll back to.
        on_bad: what to do.
        limit: maximum number of skipped steps in a row, or of rollbacks in total, before the training ends.
        factor: factor of the learning rate after a rollback.
    """

    def __init__(
        self,
        path: str | Path,
        last: str | Path,
        on_bad: Literal["stop", "skip", "rollback"] = "stop",
        limit: PositiveInt = 3,
        factor: Annotated[float, Range(gt=0, le=1)] = 0.5,
    ) -> None:
        self.path, self.last, self.on_bad, self.limit, self.factor = Path(path), Path(last), on_bad, limit, factor
        self.in_a_row, self.skipped, self.returns, self.lr_scale = 0, 0, 0, 1.0
        self._batches: list[tuple[Any, tuple[int, ...]]] = []  # of the coming step, each with its random key
        self._statistics: list[Tensor] = []
        self._loss: Tensor | None = None
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._reader = HostReader()
        self._brake: Brake | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the factor of the learning rate."""
        return {"skipped": self.skipped, "returns": self.returns, "lr_scale": self.lr_scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a resumed training."""
        self.skipped, self.returns = state_dict["skipped"], state_dict["returns"]
        self.lr_scale = state_dict["lr_scale"]

    def on_train_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Apply the learning rate factor of earlier rollbacks, and choose how to read verdicts."""
        if self.lr_scale != 1:
            _scale_rates(trainer, self.lr_scale)
        parts = trained_parts(pl_module.objective)
        modules = {"": pl_module.model, **{f"objective.{name}.": part for name, part in parts.items()}}
        self._parameters = [
            (f"{at}{name}", value) for at, part in modules.items() for name, value in part.named_parameters()
        ]
        self._reader = DeviceReader() if pl_module.device.type == "cuda" else HostReader()
        self._brake = Brake(trainer.optimizers[0]) if self._reader.late else None

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches of the step, and BatchNorm's statistics before it."""
        if not self._batches and (self._reader.late or self.on_bad == "skip"):
            self._statistics = [buffer.clone() for buffer in pl_module.model.buffers()]
        self._batches.append((batch, pl_module.batch_key()))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the scalar loss to that of the step."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.world_size > 1:
            spoil_gradients(loss)

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ImageClassifier, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the loss and the gradients, and act by `on_bad`: on a GPU for the step before."""
        if self._settle(trainer, pl_module) and self.on_bad == "rollback":
            self._batches, self._loss = [], None  # the gradients are of the weights before the rollback, and dropped
            return
        batches, self._batches = self._batches, []
        assert self._loss is not None
        loss, self._loss = self._loss, None
        names, grads = gradients(self._parameters)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # it skips bad gradients itself
        bad, norms = judge(loss, [] if scaled else grads)
        self._reader.post(Step(trainer.current_epoch, trainer.global_step, batches, loss, norms, names, bad))
        if not self._reader.late:
            self._settle(trainer, pl_module)
            return
        assert self._brake is not None
        if not scaled:
            self._brake.set(bad, grads)
        restore_if(bad, pl_module.model.buffers(), self._statistics)

    def before_checkpoint(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:
        """Act on the last step before `Preemption` saves a checkpoint, which must not count a bad step as done."""
        self._settle(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Act on the last step before a validation."""
        self._settle(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Act on the last step of an epoch."""
        self._settle(trainer, pl_module)

    def _settle(self, trainer: L.Trainer, pl_module: ImageClassifier) -> bool:
        """Read the verdict of the step that was posted last, and act if it is bad; return whether it is."""
        posted, step = self._reader.pending is not None, self._reader.take()
        if step is None:
            self.in_a_row = 0 if posted else self.in_a_row
            return False
        self._act(trainer, pl_module, self._describe(trainer, pl_module, step))
        return True

    def _describe(self, trainer: L.Trainer, pl_module: ImageClassifier, step: Step) -> str:
        """Save the bad step to the file, and return a sentence about what happened where."""
        loss = float(step.loss)
        what = f"a loss of {loss}" if not math.isfinite(loss) else "a non-finite gradient"
        where = first_bad(pl_module, step, trainer.precision_plugin.forward_context)
        weights = {name: gathered(tensor) for name, tensor in pl_module.model.state_dict().items()}
        path = self.path
        if trainer.global_rank:
            path = path.with_stem(f"{path.stem}_rank{trainer.global_rank}")
        if trainer.is_global_zero or not math.isfinite(loss):
            classes = pl_module.num_classes
            kept = {
                "epoch": step.epoch,
                "step": step.number,
                "batches": [{**_plain(batch, classes), "random_key": list(key)} for batch, key in step.batches],
                "weights": weights,
            }
            torch.save(kept, path)
        return f"epoch {step.epoch + 1}, step {step.number + 1}: {what}, first in {where}"

    def _act(self, trainer: L.Trainer, pl_module: ImageClassifier, sentence: str) -> None:
        saved = f"{sentence}; saved to {self.path}"
        if self.on_bad == "stop":
            raise TrainingError(f"{saved}. To continue anyway, set callbacks.nonfinite_guard.on_bad=skip or rollback.")
        if self.on_bad == "skip":
            self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
            if self.in_a_row > self.limit:
                raise TrainingError(f"{saved}. The last {self.limit} steps had already been skipped.")
            log.warning("%s. Step skipped; %d skipped so far.", saved, self.skipped)
            if self._brake is not None:  # the device has skipped the step
                self._brake.release()
                return
            restore_if(torch.ones((), device=pl_module.device), pl_module.model.buffers(), self._statistics)
        else:
            self.returns += 1
            if self.returns > self.limit:
                raise TrainingError(f"{saved}. The training had already been rolled back {self.limit} times.")
            if not self.last.is_file():
                raise TrainingError(f"{saved}. There is no checkpoint yet to roll back to.")
            self.lr_scale *= self.factor
            self._roll_back(trainer, pl_module)
            log.warning("%s. Rolled back to %s; learning rate times %g.", saved, self.last, self.lr_scale)
        pl_module.zero_grad(set_to_none=True)

    def _roll_back(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:
        """Restore weights, EMA weights and moments from the last checkpoint, and lower the learning rate."""
        trainer.strategy.checkpoint_io.teardown()  # the first process may still be writing
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
    """Multiply the current learning rate, and all later ones of timm's schedule, by `factor`."""
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        scheduler.base_values = [factor * value for value in scheduler.base_values]
        scheduler.warmup_steps = [factor * value for value in scheduler.warmup_steps]
        scheduler.warmup_lr_init *= factor
        scheduler.lr_min *= factor


def _plain(batch: Batch, num_classes: int) -> dict[str, Any]:
    """Return a batch as dicts, lists and tensors, which `torch.load(weights_only=True)` can read."""
    parts: dict[str, Any] = {"image": batch.image, "label": batch.label, "key": list(batch.key)}
    if batch.mix is not None:
        parts["mixed_label"] = TargetBuilder.class_labels(batch, num_classes)
    if batch.label_map is not None:
        parts["label_map"] = dict(zip(("scores", "classes", "box", "flipped"), batch.label_map, strict=True))
    return parts


@torch.no_grad()
def first_bad(module: ImageClassifier, step: Step, context: Any) -> str:
    """Name the source of the first non-finite number: a weight, the images, a module, the loss or a gradient.

    Every process computes every batch, even after it has found the source, because a sharded model needs all processes.
    """
    found = [
        f"the weight {name}, which was already non-finite before this step"
        for name, parameter in module.model.named_parameters()
        if not local(parameter).isfinite().all()
    ]

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            if any(isinstance(part, Tensor) and not part.isfinite().all() for part in outputs):
                found.append(f"the output of {name}")

        return hook

    buffers = [buffer.clone() for buffer in module.model.buffers()]
    for batch, key in step.batches:
        if not batch.image.isfinite().all():
            bad = [name for name, image in zip(batch.key, batch.image, strict=True) if not image.isfinite().all()]
            found.append(f"the images {', '.join(bad[:3])}")
        handles = [part.register_forward_hook(look(name)) for name, part in module.model.named_modules() if name]
        reseed(*key)  # draws the same dropout and drop path as the step
        with context():
            if batch.image.ndim == 4:  # otherwise cached features
                forward_heads(module.model, batch.image)
        for handle in handles:
            handle.remove()
    for buffer, before in zip(module.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if found:
        return found[0]
    named = step.bad_gradients()
    return f"the gradient of {named[-1]}" if named else "the loss"
