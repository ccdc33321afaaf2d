"""Linear probes: classifiers of a frozen backbone's pooled features, one for each learning rate, in one training.

Follows the protocol of DINOv2 and DINOv3 (Oquab et al., arXiv:2304.07193, appendix B.3; github.com/facebookresearch/
dinov3, eval/linear.py). Differences:
- The learning rate is chosen on held-out training images; the official code chooses it on the images that it reports.
- The features are those that the backbone pools; the official code joins class token and mean of the patches.
  The best classifier can therefore replace the backbone's, and the run can be evaluated, exported and used as an
  annotator like any other.

Shapes: B images, D features, C classes, K learning rates, H x W pixels.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from vitrail.errors import ArgumentError, ConfigError
from vitrail.models.probing import class_classifier, pooled_features, write_classifier
from vitrail.objectives.contract import check_losses, needs_of, passes_of, trained_parts
from vitrail.training.classifier import ImageClassifier, ValidationMetrics
from vitrail.types import Batch, Outputs
from vitrail_runtime.checking import Positive, Range, checked

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a linear probe.

    Attributes:
        lr_factors: learning rates to train with, as factors of the optimiser's.
        held_out: share of the training images that the learning rate is chosen on, in (0, 1).
        cache: compute the features of all images once, without augmentation, and train on them.
    """

    lr_factors: Sequence[Positive]
    held_out: Annotated[float, Range(gt=0, lt=1)] = 0.1
    cache: bool = False

    def __post_init__(self) -> None:
        if not self.lr_factors or len(set(self.lr_factors)) < len(self.lr_factors):
            raise ArgumentError("lr_factors", list(self.lr_factors), "must be different numbers, at least one")


class LinearProbe(ImageClassifier):
    """LightningModule that trains K linear classifiers of a frozen backbone's features, and keeps the best one.

    After each validation, the backbone's classifier becomes the one with the highest top-1 on held-out images.

    Logs, per epoch: `train/loss` (of the best classifier so far), `held_out/top1`, `held_out/top5`, `held_out/loss`,
    `val/top1`, `val/top5` and `val/loss` of the best classifier, `held_out/lr`, its peak learning rate before the
    scaling with the batch size, and `held_out/top1_lr_<lr>` of each.

    Args:
        model: backbone that passes `check_probe`.
        objective: loss of class logits.
        num_classes: number of classes, C.
        settings: learning rates, held-out images and cache.
        kwargs: other arguments of `ImageClassifier`.

    Raises:
        ConfigError: the objective needs more than class logits and a label, or several forward passes.
    """

    def __init__(
        self, model: nn.Module, objective: nn.Module, num_classes: int, settings: ProbeSettings, **kwargs: Any
    ) -> None:
        needs = needs_of(objective) - {"teacher_logits"}
        if needs or passes_of(objective) > 1 or trained_parts(objective):
            raise ConfigError(
                f"objective: {type(objective).__name__} needs more than the class logits of one pass, which is all that"
                " a linear probe has; set objective=cross_entropy."
            )
        super().__init__(model, objective, num_classes, **kwargs)
        model.requires_grad_(False).eval()
        self.settings = settings
        self.classifiers = new_classifiers(model, len(settings.lr_factors))
        self.part_lr_scales = {f"classifiers.{i}": factor for i, factor in enumerate(settings.lr_factors)}
        self.chosen = 0
        self.metrics = nn.ModuleDict(
            {name: nn.ModuleList(ValidationMetrics(num_classes) for _ in self.classifiers) for name in _VALIDATED}
        )
        self.pool: Any = pooled_features
        if self.compile_mode:
            self.pool = torch.compile(pooled_features, mode=self.compile_mode, dynamic=False)

    @property
    def lrs(self) -> list[float]:
        """Peak learning rate of each classifier, before the scaling with the batch size; (K,)."""
        assert self.optimizer is not None
        return [self.optimizer.lr * factor for factor in self.settings.lr_factors]

    def train(self, mode: bool = True) -> "LinearProbe":
        """Set the mode of all but the backbone, which stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def trained_parts(self) -> dict[str, nn.Module]:
        """Return the classifiers by their dotted names."""
        return {f"classifiers.{i}": classifier for i, classifier in enumerate(self.classifiers)}

    def on_fit_start(self) -> None:
        """Compute the features of all images, if they are cached."""
        super().on_fit_start()
        if self.settings.cache:
            log.info("linear probe: computing the features of all images")
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.eval()
            with self.trainer.precision_plugin.val_step_context():
                data.fill_cache(self._features, self._gather)
            self.train()

    def _gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors (B, ...) of all processes, (processes, B, ...)."""
        gathered: Any = self.all_gather(tensor.to(self.device))
        return gathered.reshape(-1, *tensor.shape)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, H, W)."""
        return self.pool(self.model, self.filled(images.to(self.device)))[: len(images)]

    def _outputs(self, batch: Batch) -> list[Outputs]:
        """Return the logits of each classifier for a batch of images (B, 3, H, W), or of their features (B, D)."""
        features = batch.image if self.settings.cache else self._features(batch.image)
        return [Outputs(classifier(features)) for classifier in self.classifiers]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the losses of all classifiers, which do not depend on each other."""
        targets = self.targets(batch, self.objective, self.num_classes, None)
        losses = [self.objective(outputs, targets) for outputs in self._outputs(batch)]
        check_losses(losses[0], self.objective)
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses[self.chosen].items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch.image),
            prog_bar=True,
        )
        return torch.stack([loss["loss"] for loss in losses]).sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of each classifier."""
        metrics: Any = self.metrics[_VALIDATED[dataloader_idx]]
        for outputs, metric in zip(self._outputs(batch), metrics, strict=True):
            metric.update(outputs.cls.float(), batch.label)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which classifier is the best one so far."""
        checkpoint["chosen_classifier"] = self.chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore which classifier is the best one so far."""
        super().on_load_checkpoint(checkpoint)
        self.chosen = checkpoint["chosen_classifier"]

    def on_validation_epoch_end(self) -> None:
        """Choose the classifier that is best on held-out images, copy it to the backbone, and log the metrics."""
        metrics: Any = self.metrics
        val, held_out = ([metric.compute_and_reset(f"{name}/") for metric in metrics[name]] for name in _VALIDATED)
        rank = [(float(row["held_out/top1"]), -float(row["held_out/loss"])) for row in held_out]
        self.chosen = rank.index(max(rank))
        best: Any = self.classifiers[self.chosen]
        write_classifier(self.model, best.weight, best.bias)
        lr = self.lrs[self.chosen]
        every = {f"held_out/top1_lr_{lr:g}": row["held_out/top1"] for lr, row in zip(self.lrs, held_out, strict=True)}
        chosen = {**val[self.chosen], **held_out[self.chosen]}
        self.log_dict(chosen, prog_bar=True, sync_dist=True, batch_size=1)
        self.log_dict({**every, "held_out/lr": lr}, sync_dist=True, batch_size=1)
        if self.trainer.is_global_zero:
            log.info("linear probe: lr %g is the best one, top-1 %.2f %% on held-out images", lr, rank[self.chosen][0])


_VALIDATED = ("val", "held_out")
"""Validation loaders, in order."""


def new_classifiers(model: nn.Module, count: int) -> nn.ModuleList:
    """Return linear classifiers for the pooled features of `model`, with the initial weights of the official code."""
    own = class_classifier(model)
    classifiers = [nn.Linear(own.in_features, own.out_features) for _ in range(count)]
    for classifier in classifiers:
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
    return nn.ModuleList(classifiers)
