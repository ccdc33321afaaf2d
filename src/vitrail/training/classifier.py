"""The LightningModule: one training step, one validation step, nothing about where they run."""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from vitrail.data import Mixing, MixToken
from vitrail.data.label_maps import pooled_scores, sparse_token_targets
from vitrail.data.randomness import reseed
from vitrail.errors import ConfigError
from vitrail.models import forward_heads
from vitrail.models.shards import gathered
from vitrail.objectives import TokenLabelingLoss
from vitrail.training.optimizers import OptimizerFactory
from vitrail.training.schedules import CosineSchedule
from vitrail.types import IGNORE, LabelMap, Sample, Targets


class ImageClassifier(L.LightningModule):
    """Train and validate a backbone.

    Logs, per epoch: `train/<loss>`, `train/grad_norm`, `train/lr`, `val/loss`, `val/top1`, `val/top5` (in %).

    Args:
        model: backbone.
        objective: maps (Heads, Targets) to a dict of losses, of which `loss` is minimised.
        num_classes: C.
        optimizer: what to build the optimiser from; only needed to train.
        schedule: of the learning rate; only needed to train.
        mixing: mixup and CutMix of training batches; None for none.
        seed: of mixing, and of dropout and drop path, whose draws differ from rank to rank.
        compile_mode: mode of `torch.compile` (`default`, `max-autotune`, ...); None runs eagerly. The state dict's
            keys are the same with and without.
        checkpointing: recompute activations in the backward pass to save memory.
        teacher: maps images to the logits that a distillation objective compares with; it is neither trained nor saved.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory | None = None,
        schedule: CosineSchedule | None = None,
        mixing: Mixing | MixToken | None = None,
        seed: int = 0,
        compile_mode: str | None = None,
        checkpointing: bool = False,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.num_classes = model, objective, num_classes
        self.optimizer, self.schedule = optimizer, schedule
        self.mixing, self.seed = mixing, seed
        self._teacher = () if teacher is None else (teacher,)  # a tuple hides it from state dict and optimiser
        self.compile_mode = compile_mode
        self.heads = torch.compile(forward_heads, mode=compile_mode) if compile_mode else forward_heads
        if checkpointing:
            _set_grad_checkpointing(model)
        self.val_metrics = validation_metrics(num_classes)
        self._epoch_began: int | None = None  # step; None: not yet, nor when a resumed training begins within an epoch

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images; of backbones with several heads merged as published."""
        return self.heads(self.model, images).merged()

    # Training

    def configure_model(self) -> None:
        """Let a strategy that shards the backbone do so, before its optimiser is built."""
        if shard := getattr(self.trainer.strategy, "shard", None):
            shard(self.model, self.compile_mode)
            self.heads = forward_heads  # the blocks are compiled instead

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the schedule follow from the config, which may ask for more epochs than the checkpoint's did."""
        checkpoint["lr_schedulers"] = [{} for _ in checkpoint["lr_schedulers"]]

    def on_train_start(self) -> None:
        """Set the rate of the step that comes next."""
        if self.schedule is not None and self.trainer.lr_scheduler_configs:
            scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
            epoch, batches = next_batch(self.trainer)
            self.schedule.advance(scheduler, self.current_epoch, self._steps_until(epoch, batches))

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        """Let dropout and drop path draw what this batch is due on this rank, whatever was drawn before.

        A training that is resumed draws as one that was not interrupted.
        """
        reseed(*self.batch_key())
        if self._epoch_began is None:
            self._epoch_began = self.global_step
            lr = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
            self.log("train/lr", lr, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Mix a training batch on its device, so that callbacks see what the network sees."""
        if not self.training or not isinstance(self.mixing, Mixing) or not isinstance(batch, Sample):
            return batch  # the summary sends its example through here, a bare tensor
        key = self.batch_key()
        share = self.mixing.shares(batch.image, key) if batch.label_map else ()
        image, label = self.mixing(batch.image, batch.label, self.num_classes, key)
        return batch._replace(image=image, label=label, share=share)

    def batch_key(self) -> tuple[int, int, int]:
        """What the draws for the batch at hand are a function of."""
        batches_seen = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return self.seed, batches_seen, self.global_rank

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Scalar loss of one batch."""
        box = share = None
        if isinstance(self.mixing, MixToken):
            box, share = self.mixing.box(token_grid(self.model, batch.image), self.batch_key())
            box = box.to(batch.image.device)
        submodels = getattr(self.objective, "submodels", 1)
        images = batch.image if submodels == 1 else batch.image.repeat(submodels, 1, 1, 1)
        heads = self.heads(self.model, images, box)
        losses = self.objective(heads, self._targets(batch)._replace(share=share))
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch.image),
            prog_bar=True,
        )
        return losses["loss"]

    @torch.no_grad()
    def _targets(self, batch: Sample) -> Targets:
        """What the heads should say of a batch: its labels, and what a teacher or its label maps see."""
        if not isinstance(self.objective, TokenLabelingLoss):
            return Targets(cls=batch.label, teacher=self._teacher_logits(batch))
        truth = F.one_hot(batch.label, self.num_classes) if batch.label.ndim == 1 else batch.label
        truth = truth * (1 - self.objective.smoothing) + self.objective.smoothing / self.num_classes
        if not batch.label_map:
            return Targets(cls=truth)
        maps: LabelMap = batch.label_map
        grid = token_grid(self.model, batch.image)
        made = sparse_token_targets(
            maps.scores,
            maps.classes,
            maps.box,
            maps.flipped,
            grid=grid,
            num_classes=self.num_classes,
            smoothing=self.objective.smoothing,
            transpose_crops=self.objective.transpose_crops,
        )
        if not isinstance(self.mixing, Mixing):
            return Targets(made.cls, made.tokens, truth)
        left = batch.share.mean((1, 2))[:, None]  # of each image in itself
        cls = made.cls * left + made.cls.flip(0) * (1 - left)
        return Targets(cls, made.tokens.mixed(self.mixing.token_shares(batch.share, grid)), truth)

    def _teacher_logits(self, batch: Sample) -> Tensor | None:
        """What the teacher, or else the label maps that it left, say of a batch; None without either."""
        if self._teacher:
            return self._teacher[0](batch.image)
        if not batch.label_map:
            return None
        maps: LabelMap = batch.label_map
        logits = pooled_scores(maps.scores, maps.classes, maps.box, maps.flipped, self.num_classes)
        if not isinstance(self.mixing, Mixing):
            return logits
        left = batch.share.mean((1, 2))[:, None]  # of each image in itself
        return logits * left + logits.flip(0) * (1 - left)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, at each epoch's first step and every n-th: it costs time."""
        if (self.global_step - (self._epoch_began or 0)) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            self.log(
                "train/grad_norm",
                gathered(nn.utils.get_total_norm(grads)),
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                batch_size=1,
            )

    def on_train_epoch_start(self) -> None:
        """Log the learning rate of the epoch's first step (of the group that is not scaled down by layer decay)."""
        self._epoch_began = None

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]  # Lightning knows no timm scheduler
        """Optimiser and schedule for the effective batch of this run.

        Raises:
            ConfigError: a value cannot work.
        """
        assert self.optimizer is not None
        assert self.schedule is not None
        optimizer = self.optimizer.build(self.model, self.effective_batch)
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ConfigError(f"trainer.max_epochs={epochs}: must be at least 1, the schedule depends on it.")
        scheduler = self.schedule.build(optimizer, epochs, self._steps_per_epoch)
        interval = "step" if self.schedule.per_step else "epoch"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    @property
    def _steps_per_epoch(self) -> int:
        return int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1)

    def _steps_until(self, epoch: int, batches: int) -> int:
        """Optimiser steps that a training of this size takes so far; a resumed one may have been of another."""
        return epoch * self._steps_per_epoch + math.ceil(batches / self.trainer.accumulate_grad_batches)

    @property
    def effective_batch(self) -> int:
        """Images per optimiser step over all devices."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def lr_scheduler_step(self, scheduler: CosineLRScheduler, metric: Any) -> None:
        """Tell timm's scheduler the number of finished epochs or steps."""
        assert self.schedule is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.schedule.advance(scheduler, self.current_epoch + 1, self._steps_until(self.current_epoch, batches))

    # Validation

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Count one batch."""
        self.update_metrics(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all processes together."""
        self.log_dict(self.compute_metrics("val/"), prog_bar=True, sync_dist=True, batch_size=1)

    def update_metrics(self, batch: Sample) -> None:
        """Add a batch (images (B, 3, H, W), labels (B,), `IGNORE` where not to count) to the validation metrics."""
        logits = self(batch.image).float()
        self.val_metrics.update(logits, batch.label)

    def compute_metrics(self, prefix: str) -> dict[str, Tensor]:
        """Loss and top-1 and top-5 in %, over all processes since the last call."""
        return computed(self.val_metrics, prefix)


def next_batch(trainer: L.Trainer) -> tuple[int, int]:
    """Where a training that is about to start or to go on is: its epoch, and how many batches of it are done."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    within = epochs.processed < epochs.ready
    if within and not batches.is_last_batch:
        return epochs.processed, batches.current.ready
    return epochs.processed + within, 0


def token_grid(model: Any, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patch tokens that `model` makes of `images` (B, 3, H, W)."""
    return model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))


def validation_metrics(num_classes: int) -> MetricCollection:
    """Mean cross-entropy, top-1 and top-5 over what is not labelled `IGNORE`."""

    def accuracy(k: int) -> MulticlassAccuracy:
        k = min(k, num_classes)
        return MulticlassAccuracy(num_classes, top_k=k, average="micro", ignore_index=IGNORE, validate_args=False)

    return MetricCollection(
        {"loss": MeanCrossEntropy(), "top1": accuracy(1), "top5": accuracy(5)}, compute_groups=False
    )


def computed(metrics: MetricCollection, prefix: str) -> dict[str, Tensor]:
    """Loss and accuracies, these in %, over all processes since the last call."""
    values = metrics.compute()
    metrics.reset()
    return {f"{prefix}{name}": value if name == "loss" else 100 * value for name, value in values.items()}


class MeanCrossEntropy(Metric):
    """Mean cross-entropy over what is not labelled `IGNORE`; torchmetrics has no loss that leaves samples out."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits (B, C) and labels (B,)."""
        self.total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        self.count += (labels != IGNORE).sum()

    def compute(self) -> Tensor:
        """Scalar."""
        return self.total / self.count


def _set_grad_checkpointing(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ConfigError(f"checkpointing=true: {type(model).__name__} does not support it.") from error
