"""The LightningModule: training and validation steps, independent of devices and parallelism.

Shapes: B images, C classes, H x W pixels.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from vitrail.checkpoints.shards import gathered
from vitrail.data.mixing import Mixing
from vitrail.data.phases import Phases
from vitrail.data.randomness import reseed
from vitrail.data.transfer import to_device
from vitrail.errors import ConfigError
from vitrail.models import forward_heads
from vitrail.models.heads import declared_outputs, return_features, token_grid
from vitrail.objectives.contract import (
    FeatureWidths,
    build_parts,
    check_losses,
    passes_of,
    trained_parts,
    uses_of,
)
from vitrail.training.buffers import share_buffers
from vitrail.training.metrics import ValidationMetrics
from vitrail.training.muon import describe_routing
from vitrail.training.optimizers import OptimizerFactory
from vitrail.training.schedules import CosineSchedule
from vitrail.training.targets import TargetBuilder
from vitrail.types import Batch
from vitrail_runtime.compat import batches_seen, completed_batches, next_batch, shares_batch_norm

log = logging.getLogger(__name__)


class ImageClassifier(L.LightningModule):
    """LightningModule that trains and validates a backbone.

    Logs, per epoch: `train/<loss>`, `train/grad_norm`, `train/lr`, `val/loss`, `val/top1`, `val/top5` (in %).

    Args:
        model: backbone.
        objective: maps (Outputs, Targets) to a dict of losses; see `vitrail.objectives.contract`.
        num_classes: number of classes, C.
        optimizer: optimiser factory; only needed to train.
        schedule: learning rate schedule; only needed to train.
        mixing: draws how each training batch is mixed; None for no mixing.
        targets: builds the targets, including a teacher's if it has one; None for the defaults without a teacher.
        seed: seed of mixing, dropout and drop path; the draws differ between ranks.
        compile_mode: mode of `torch.compile` (`default`, `max-autotune`, ...); None runs eagerly. The keys of the state
            dict are the same in both cases.
        grad_checkpointing: recompute activations in the backward pass to save memory.
        phases: phases of image size; None for one size. The network is compiled once for each size.
        channels_last: store the weights of overlapping convolutions channels-last, which GPUs compute faster.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory | None = None,
        schedule: CosineSchedule | None = None,
        mixing: Mixing | None = None,
        targets: TargetBuilder | None = None,
        seed: int = 0,
        compile_mode: str | None = None,
        grad_checkpointing: bool = False,
        phases: Phases | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.num_classes = model, objective, num_classes
        if "outputs.features" in uses_of(objective):
            return_features(model)
        build_parts(objective, FeatureWidths(model, None if targets is None else targets.teacher))
        self.optimizer, self.schedule = optimizer, schedule
        self.mixing, self.targets, self.seed = mixing, targets or TargetBuilder(), seed
        self.compile_mode, self.phases = compile_mode, phases
        # dynamic=False: PyTorch would compile the second size for any size, which is slower.
        self.heads = torch.compile(forward_heads, mode=compile_mode, dynamic=False) if compile_mode else forward_heads
        if channels_last and has_overlapping_convolutions(model):
            model.to(memory_format=torch.channels_last)
        if grad_checkpointing:
            _set_grad_checkpointing(model)
        self.val_metrics: Any = self.new_metrics()
        self._largest_batch = 0  # of an evaluation
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        # Optimiser step at which the epoch started; None until its first batch, also after resuming within an epoch.
        self._epoch_start_step: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) for images (B, 3, H, W); several heads are merged as in the backbone's paper."""
        return self.heads(self.model, self.filled(images)).merged()[: len(images)]

    def filled(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of an evaluation, of which the last batch is filled up with empty images.

        A smaller batch would be compiled separately.
        """
        if self.compile_mode is None or self.training:
            return images
        self._largest_batch = max(self._largest_batch, len(images))
        return nn.functional.pad(images, (0, 0) * 3 + (0, self._largest_batch - len(images)))

    def token_grid(self, images: Tensor) -> tuple[int, int] | None:
        """Return the rows and columns of patch tokens for images (B, 3, H, W); None if the backbone returns none."""
        if not {"tokens", "features"} & declared_outputs(self.model):
            return None
        size = (images.shape[-2], images.shape[-1])
        if size not in self._grids:
            self._grids[size] = token_grid(self.model, size)
        return self._grids[size]

    # Training

    part_lr_scales: Mapping[str, float] = {}
    """Learning rate factors of trained parts; 1 for the others."""

    def trained_parts(self) -> dict[str, nn.Module]:
        """Return the modules that are trained besides the backbone, by their dotted names."""
        return {f"objective.{name}": part for name, part in trained_parts(self.objective).items()}

    def setup(self, stage: str) -> None:
        """Refuse synchronised BatchNorm on CPUs.

        Raises:
            ConfigError: BatchNorm is to share its statistics between processes on CPUs.
        """
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if stage == "fit" and on_cpu and self.trainer.world_size > 1 and shares_batch_norm(self.trainer):
            raise ConfigError(
                "trainer.sync_batchnorm=true: BatchNorm's statistics can be shared between GPUs only; set it to false."
            )

    def configure_model(self) -> None:
        """Shard the backbone and the objective's trained modules, if the strategy shards; the optimiser comes later."""
        if shard := getattr(self.trainer.strategy, "shard", None):
            shard(self.model, self.compile_mode, self.trained_parts().values())
            self.heads = forward_heads  # the blocks are compiled instead

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device."""
        self.targets.to(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the checkpoint's schedule state: the config decides, and may ask for more epochs than before."""
        checkpoint["lr_schedulers"] = [{} for _ in checkpoint["lr_schedulers"]]

    def on_train_start(self) -> None:
        """Set the learning rate of the next step."""
        if self.schedule is not None and self.trainer.lr_scheduler_configs:
            scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
            epoch, batches = next_batch(self.trainer)
            self._advance(scheduler, self.current_epoch, self._steps_until(epoch, batches))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and drop path for this batch and rank, and log the learning rate at an epoch's first batch.

        The seed depends on the batch, so that a resumed training draws the same numbers.
        """
        reseed(*self.batch_key())
        if self._epoch_start_step is None:
            self._epoch_start_step = self.global_step
            # The largest one belongs to the group that layer decay does not scale down.
            lr = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
            self.log("train/lr", lr, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mix a training batch on its device, so that callbacks get the network's input."""
        # Lightning's model summary passes its example input, a bare tensor, through this hook.
        if not self.training or self.mixing is None or not hasattr(batch, "mix"):
            return batch
        mix = self.mixing.for_batch(batch.image.shape, self.token_grid(batch.image), self.batch_key())
        return batch if mix is None else batch._replace(image=mix.images(batch.image), mix=mix)

    def batch_key(self) -> tuple[int, int, int]:
        """Return the random key of the current batch: (seed, batches seen, rank)."""
        return self.seed, batches_seen(self.trainer), self.global_rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the scalar loss of a batch of images (B, 3, H, W) and labels (B,)."""
        passes = passes_of(self.objective)
        images = batch.image if passes == 1 else batch.image.repeat(passes, 1, 1, 1)
        box = None if batch.mix is None else batch.mix.token_box
        box = None if box is None else to_device(box, images.device)
        outputs = self.heads(self.model, images, box)
        targets = self.targets(batch, self.objective, self.num_classes, self.token_grid(batch.image))
        losses = self.objective(outputs, targets)
        check_losses(losses, self.objective)
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch.image),
            prog_bar=True,
        )
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm before clipping, at each epoch's first step and every `log_every_n_steps` steps."""
        step_of_epoch = self.global_step - (self._epoch_start_step or 0)
        if step_of_epoch % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # the norm costs time
            trained = (self.model, *self.trained_parts().values())
            grads = [value.grad for module in trained for value in module.parameters() if value.grad is not None]
            self.log(
                "train/grad_norm",
                gathered(nn.utils.get_total_norm(grads)).to(self.device),  # offloaded gradients are on the CPU
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                batch_size=1,
            )

    def on_train_epoch_start(self) -> None:
        """Mark the start of an epoch; its first batch logs the learning rate.

        A backbone that changes during the training (Evo-ViT) has a method `begin_epoch(epoch, epochs)`.
        """
        self._epoch_start_step = None
        if begin_epoch := getattr(self.model, "begin_epoch", None):
            begin_epoch(self.current_epoch, self.trainer.max_epochs)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]  # Lightning knows no timm scheduler
        """Build the optimiser and the schedule for this run's effective batch size.

        Raises:
            ConfigError: a value is invalid.
        """
        assert self.optimizer is not None
        assert self.schedule is not None
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ConfigError(f"trainer.max_epochs={epochs}: must be at least 1, the schedule depends on it.")
        steps = (
            self._steps_per_epoch
        )  # must come before `effective_batch`: it opens the loader if there is no data module
        parts = self.trained_parts()
        optimizer = self.optimizer.build(self.model, self.effective_batch, parts, self.part_lr_scales)
        if routing := describe_routing(optimizer, {"": self.model, **{f"{name}.": parts[name] for name in parts}}):
            log.info("%s", routing)
        scheduler = self.schedule.build(optimizer, epochs, steps)
        interval = "step" if self.schedule.per_step else "epoch"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    @property
    def _steps_per_epoch(self) -> int:
        return int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1)

    def _steps_until(self, epoch: int, batches: int) -> int:
        """Count the optimiser steps up to a position, at the current batch size.

        `global_step` differs if the training was resumed with another batch size.
        """
        return epoch * self._steps_per_epoch + math.ceil(batches / self.trainer.accumulate_grad_batches)

    @property
    def effective_batch(self) -> int:
        """Effective batch size: images per optimiser step over all devices."""
        loader: Any = self.trainer.datamodule or self.trainer.train_dataloader  # type: ignore[attr-defined]
        return loader.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def lr_scheduler_step(self, scheduler: CosineLRScheduler, metric: Any) -> None:
        """Advance timm's scheduler to the number of finished epochs and steps."""
        batches = completed_batches(self.trainer)
        self._advance(scheduler, self.current_epoch + 1, self._steps_until(self.current_epoch, batches))

    def _advance(self, scheduler: CosineLRScheduler, epochs: float, steps: float) -> None:
        """Set the learning rate after `epochs` finished epochs and `steps` optimiser steps."""
        assert self.schedule is not None
        done = steps / max(1, self._steps_per_epoch)
        if self.phases is not None:
            length = max(1, self._steps_per_epoch)
            epochs, steps = self.phases.schedule_epochs(epochs), self.phases.schedule_epochs(steps / length) * length
        self.schedule.advance(scheduler, epochs, steps)
        for group in scheduler.optimizer.param_groups:
            if done < group.get("freeze_epochs", 0):
                group["lr"] = 0.0

    # Validation

    def on_validation_start(self) -> None:
        """Measure the running statistics that a checkpoint contains, those of the first process."""
        share_buffers(self.model.buffers())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics with images (B, 3, H, W) and labels (B,); `IGNORE` marks images to leave uncounted."""
        self.measure(batch, self.val_metrics)

    def new_metrics(self) -> nn.Module:
        """Return empty validation metrics, such as for the EMA weights."""
        return ValidationMetrics(self.num_classes)

    def measure(self, batch: Batch, metrics: Any) -> None:
        """Update `metrics`, a result of `new_metrics`, with a validation batch."""
        metrics.update(self(batch.image).float(), batch.label)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all processes."""
        self.log_dict(self.val_metrics.compute_and_reset("val/"), prog_bar=True, sync_dist=True, batch_size=1)


def has_overlapping_convolutions(model: nn.Module) -> bool:
    """Return whether a convolution's windows overlap; others are matrix products of patches, in any memory format."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(k > s for module in convolutions for k, s in zip(module.kernel_size, module.stride, strict=True))


def _set_grad_checkpointing(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ConfigError(f"grad_checkpointing=true: {type(model).__name__} does not support it.") from error
