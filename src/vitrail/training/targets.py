"""Targets of a batch, built in one place: from labels, label maps with views, mixing and teachers.

Numerically as the official token-labelling code (github.com/zihangJiang/TokenLabeling, commit 9dbfd59), except where
docs/fidelity.md says otherwise. An objective gets what it declares (`vitrail.objectives.contract`) and nothing else.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.label_maps import pooled_scores, sparse_token_targets
from vitrail.errors import ConfigError
from vitrail.models.heads import declared_outputs
from vitrail.objectives.contract import TARGET_NEEDS, needs_of, uses_of
from vitrail.types import Batch, LabelMap, SparseTokens, Targets

_GROUND_TRUTH = ("none", "published", "intended")


class TargetBuilder:
    """Builds the `Targets` of a batch on the training device.

    Args:
        smoothing: of token targets and of the class token's target beside them, in [0, 1). (Cross-entropy on plain
            labels has a smoothing of its own.)
        transpose_crops: take token labels from the transposed crop, as the official code does.
        ground_truth: how the data's label enters the class token's target beside an annotator's: `none`; `published`:
            half of each if annotator and label agree on the best class, else 0.9 annotator and 0.1 label; `intended`,
            as the comment of the official code has it: trust the label more where the annotator is wrong, half of each
            if they agree, else 0.1 annotator and 0.9 label.
        teacher: gives logits (B, C) and `features(images)` (B, N, D); neither trained nor saved.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        transpose_crops: bool = False,
        ground_truth: str = "none",
        teacher: nn.Module | None = None,
    ) -> None:
        if not 0 <= smoothing < 1:
            raise ConfigError(f"targets.smoothing={smoothing}: must lie in [0, 1).")
        if ground_truth not in _GROUND_TRUTH:
            raise ConfigError(f"targets.ground_truth={ground_truth}: choose {', '.join(_GROUND_TRUTH)}.")
        self.smoothing, self.transpose_crops, self.ground_truth = smoothing, transpose_crops, ground_truth
        self.teacher = teacher

    def to(self, device: torch.device) -> "TargetBuilder":
        """Move the teacher to `device`."""
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch, objective: nn.Module, num_classes: int, grid: tuple[int, int] | None) -> Targets:
        """Build what `objective` declares.

        Args:
            batch: mixed images, with labels and label maps as they were before mixing.
            objective: asked for what it uses.
            num_classes: C.
            grid: rows and columns of the backbone's patch tokens; None if it gives no token logits.
        """
        uses = uses_of(objective)
        logits = self._teacher_logits(batch, num_classes) if "teacher_logits" in uses else None
        features = self._teacher_features(batch) if "teacher_features" in uses else None
        if "token_targets" not in uses:
            return Targets(self.class_labels(batch, num_classes), None, logits, features)
        assert grid is not None, "token targets need a backbone with token logits"
        cls, tokens = self._token_targets(batch, num_classes, grid)
        return Targets(cls, tokens, logits, features)

    @staticmethod
    def class_labels(batch: Batch, num_classes: int) -> Tensor:
        """Return what the data says of the images as mixed: class indices (B,), or probabilities (B, C)."""
        if batch.mix is None:
            return batch.label
        return batch.mix.probabilities(F.one_hot(batch.label, num_classes).float())

    def _token_targets(
        self, batch: Batch, num_classes: int, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | SparseTokens]:
        """Targets of the class token (B, C) and of the patch tokens (B, N, C); (B, 1, C) without label maps."""
        truth = F.one_hot(batch.label, num_classes) * (1 - self.smoothing) + self.smoothing / num_classes
        tokens: Tensor | SparseTokens
        if batch.label_map is None:
            cls, tokens = truth, truth[:, None]
            if batch.mix is not None and batch.mix.token_box is None:
                tokens = batch.mix.probabilities(truth)[:, None]
        else:
            maps: LabelMap = batch.label_map
            made = sparse_token_targets(
                *maps,
                grid=grid,
                num_classes=num_classes,
                smoothing=self.smoothing,
                transpose_crops=self.transpose_crops,
            )
            cls = blend_ground_truth(made.cls, truth, self.ground_truth)
            tokens = made.tokens if batch.mix is None else batch.mix.tokens(made.tokens, grid)
        return (cls if batch.mix is None else batch.mix.probabilities(cls)), tokens

    def _teacher_logits(self, batch: Batch, num_classes: int) -> Tensor | None:
        """Logits (B, C) of the teacher for the mixed images, or else of the label maps that it left."""
        if self.teacher is not None:
            return self.teacher(batch.image)
        if batch.label_map is None:
            return None
        logits = pooled_scores(*batch.label_map, num_classes)
        return logits if batch.mix is None else batch.mix.probabilities(logits)

    def _teacher_features(self, batch: Batch) -> Tensor | None:
        teacher: Any = self.teacher
        return None if teacher is None else teacher.features(batch.image)


def blend_ground_truth(annotated: Tensor, truth: Tensor, mode: str) -> Tensor:
    """Blend an annotator's class probabilities (B, C) with those of the label; `mode` as in `TargetBuilder`."""
    if mode == "none":
        return annotated
    disagreeing = 0.9 if mode == "published" else 0.1
    agree = annotated.argmax(-1, keepdim=True) == truth.argmax(-1, keepdim=True)
    ratio = torch.where(agree, 0.5, disagreeing)
    return ratio * annotated + (1 - ratio) * truth


def check_contracts(model: nn.Module, objective: nn.Module, mixing: Any, provided: frozenset[str]) -> None:
    """Refuse an objective, backbone, mixing, data and teacher that do not fit together.

    Args:
        model: backbone; asked for its outputs.
        objective: asked for its needs.
        mixing: asked for its needs; None for none.
        provided: what data and teacher provide: `label_maps`, `teacher_logits`, `teacher_features`.

    Raises:
        ConfigError: one sentence that names the key to change.
    """
    name, needs, uses = type(objective).__name__, needs_of(objective), uses_of(objective)
    outputs, has_maps, taught = declared_outputs(model), "label_maps" in provided, provided - {"label_maps"}
    available = {f"outputs.{output}" for output in outputs} | taught
    if has_maps:
        available |= {"token_targets", "teacher_logits"}
    for need in sorted(needs - available):
        raise ConfigError(_missing(need, name, model, outputs))
    if has_maps and not uses & {"token_targets", "teacher_logits"}:
        raise ConfigError(f"data.label_maps: {name} reads none; set objective=token_labeling.")
    if taught and not uses & taught:
        raise ConfigError(f"teacher: {name} asks none; set objective=distillation.")
    if taught and has_maps and "token_targets" not in uses:
        raise ConfigError("data.label_maps: hold a teacher's answers already; omit them or the teacher (~teacher).")
    mixing_needs = frozenset(getattr(mixing, "needs", ()))
    if "token_targets" in mixing_needs and "token_targets" not in uses:
        raise ConfigError(f"mixing: {mixing.describe()} needs targets of tokens; set objective=token_labeling.")
    if "mixes_tokens" in mixing_needs and not getattr(model, "mixes_tokens", False):
        raise ConfigError(
            f"mixing: {mixing.describe()} needs a backbone that swaps tokens behind its stem, such as a ViT;"
            f" {type(model).__name__} does not, set mixing=mixup_cutmix or mixing=none."
        )


def _missing(need: str, objective: str, model: nn.Module, outputs: frozenset[str]) -> str:
    """Return the sentence that says how to meet a need."""
    backbone = type(model).__name__
    if need == "outputs.tokens":
        return (
            f"objective: {objective} needs token logits, which {backbone} has not; set model.token_head=true or choose"
            " an LV-ViT."
        )
    if need.startswith("outputs."):
        return f"objective: {objective} needs {need}; {backbone} gives {', '.join(sorted(outputs))}."
    if need == "token_targets":
        return (
            f"data.label_maps: not set, but {objective} needs token targets; objective=cross_entropy teaches every"
            " token the image's label instead."
        )
    if need == "teacher_logits":
        return f"teacher: not set, but {objective} learns from one; teacher=regnety_160 is DeiT's."
    if need == "teacher_features":
        return f"teacher: not set, but {objective} learns from its features; set teacher=timm teacher.name=..."
    known = ", ".join((*TARGET_NEEDS, "outputs.<name>"))
    return f"objective: {objective} needs {need}, which nothing provides; known needs are {known}."
