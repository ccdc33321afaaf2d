"""Build the targets of a batch from labels, label maps, mixing and teachers.

The numbers equal those of the official token-labelling code (github.com/zihangJiang/TokenLabeling, commit 9dbfd59);
docs/fidelity.md lists the exceptions. An objective gets the targets that it declares (`vitrail.objectives.contract`)
and nothing else.

Shapes: B images, C classes, N patch tokens, D features.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.data.label_maps import pooled_scores, sparse_token_targets
from vitrail.errors import ConfigError
from vitrail.models.heads import declared_outputs, patch_drop_rate
from vitrail.objectives.classification import one_hot
from vitrail.objectives.contract import TARGET_NEEDS, needs_of, trained_parts, uses_of
from vitrail.types import Batch, LabelMap, SparseTokens, Targets
from vitrail_runtime.checking import Rate, checked


@checked
class TargetBuilder:
    """Builder of the `Targets` of a batch on the training device.

    Args:
        smoothing: label smoothing of the token targets and of the class token's target that comes with them, in [0, 1).
            (Cross-entropy on plain labels has its own smoothing.)
        transpose_crops: take token labels from the transposed crop, as the official code does.
        ground_truth: how to blend the data's label into the annotator's target for the class token. `none`: not at
            all. `published`: half of each if annotator and label agree on the best class, otherwise 0.9 annotator and
            0.1 label. `intended`, as described in a comment of the official code: half of each if they agree,
            otherwise 0.1 annotator and 0.9 label, so that the label counts more if the annotator is wrong. `only`: the
            label alone, so that label maps teach the patch tokens only.
        teacher: module that returns logits (B, C) and has `features(images)` (B, N, D), with a second argument `grid`
            if the objective uses `outputs.features`, and `heads(images)`, as far as the objective needs them; neither
            trained nor saved.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        smoothing: Rate = 0.1,
        transpose_crops: bool = False,
        ground_truth: Literal["none", "published", "intended", "only"] = "none",
        teacher: nn.Module | None = None,
    ) -> None:
        self.smoothing, self.transpose_crops, self.ground_truth = smoothing, transpose_crops, ground_truth
        self.teacher = teacher

    def to(self, device: torch.device) -> "TargetBuilder":
        """Move the teacher to `device`."""
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch, objective: nn.Module, num_classes: int, grid: tuple[int, int] | None) -> Targets:
        """Build the targets that `objective` declares.

        Args:
            batch: mixed images (B, 3, H, W), with labels (B,) and label maps from before mixing.
            objective: objective whose declared targets are built.
            num_classes: number of classes, C.
            grid: rows and columns of the backbone's patch tokens; None if it returns none.
        """
        uses = uses_of(objective)
        taught = self._teacher_targets(batch, num_classes, uses, grid if "outputs.features" in uses else None)
        if "token_targets" not in uses or grid is None:
            return Targets(self.class_labels(batch, num_classes), None, **taught)
        cls, tokens = self._token_targets(batch, num_classes, grid)
        return Targets(cls, tokens, **taught)

    @staticmethod
    def class_labels(batch: Batch, num_classes: int) -> Tensor:
        """Return the labels of the mixed images: class indices (B,) without mixing, otherwise probabilities (B, C)."""
        if batch.mix is None:
            return batch.label
        return batch.mix.probabilities(one_hot(batch.label, num_classes))

    def _token_targets(
        self, batch: Batch, num_classes: int, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | SparseTokens]:
        """Return targets of the class token (B, C) and of the patch tokens (B, N, C); (B, 1, C) without label maps."""
        truth = one_hot(batch.label, num_classes) * (1 - self.smoothing) + self.smoothing / num_classes
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

    def _teacher_targets(
        self, batch: Batch, num_classes: int, uses: frozenset[str], grid: tuple[int, int] | None
    ) -> dict[str, Any]:
        """Return the targets from the teacher by name; logits and features together take one forward pass.

        Features (B, N, D) are on `grid` (rows, columns) if it is given, else on the teacher's own grid.
        """
        teacher: Any = self.teacher
        found: dict[str, Any] = {}
        at_once = hasattr(teacher, "logits_and_features") and grid is None
        if {"teacher_logits", "teacher_features"} <= uses and at_once:
            found["teacher_logits"], found["teacher_features"] = teacher.logits_and_features(batch.image)
        else:
            if "teacher_logits" in uses:
                found["teacher_logits"] = self._teacher_logits(batch, num_classes)
            if "teacher_features" in uses and teacher is not None:
                arguments = () if grid is None else (grid,)
                found["teacher_features"] = teacher.features(batch.image, *arguments)
        if "teacher_heads" in uses and teacher is not None:
            found["teacher_heads"] = teacher.heads(batch.image)
        return found

    def _teacher_logits(self, batch: Batch, num_classes: int) -> Tensor | None:
        """Return the teacher's logits (B, C) for the mixed images; without a teacher, those stored in label maps."""
        if self.teacher is not None:
            return self.teacher(batch.image)
        if batch.label_map is None:
            return None
        logits = pooled_scores(*batch.label_map, num_classes)
        return logits if batch.mix is None else batch.mix.probabilities(logits)


def blend_ground_truth(annotated: Tensor, truth: Tensor, mode: str) -> Tensor:
    """Blend an annotator's class probabilities (B, C) with the label's (B, C); `mode` is `ground_truth` above."""
    if mode == "none":
        return annotated
    if mode == "only":
        return truth
    disagreeing = 0.9 if mode == "published" else 0.1
    agree = annotated.argmax(-1, keepdim=True) == truth.argmax(-1, keepdim=True)
    ratio = torch.where(agree, 0.5, disagreeing)
    return ratio * annotated + (1 - ratio) * truth


def check_contracts(model: nn.Module, objective: nn.Module, mixing: Any, provided: frozenset[str]) -> None:
    """Check that objective, backbone, mixing, data and teacher fit together.

    Args:
        model: backbone, which declares its outputs.
        objective: objective, which declares its needs.
        mixing: mixing, which declares its needs; None for no mixing.
        provided: what data and teacher provide: `label_maps`, `teacher_logits`, `teacher_features`, `teacher_heads`.

    Raises:
        ConfigError: they do not fit; the message names the key to change.
    """
    name, needs, uses = type(objective).__name__, needs_of(objective), uses_of(objective)
    outputs, has_maps, taught = declared_outputs(model), "label_maps" in provided, provided - {"label_maps"}
    available = {f"outputs.{output}" for output in outputs} | taught
    if has_maps:
        available |= {"teacher_logits", *({"token_targets"} if "tokens" in outputs else ())}
    for need in sorted(needs - available):
        no_tokens = need == "token_targets" and "tokens" not in outputs
        raise ConfigError(_missing("outputs.tokens" if no_tokens else need, name, model, outputs))
    if "tokens" not in outputs:
        uses -= {"token_targets"}
    _check_objective(objective)
    if (rate := patch_drop_rate(model)) and uses & {"token_targets", "outputs.tokens", "outputs.features"}:
        raise ConfigError(
            f"model.patch_drop_rate={rate:g}: drops patch tokens, and {name} compares every patch token with its own"
            " target; set model.patch_drop_rate=0, or an objective on the class token such as objective=cross_entropy."
        )
    if has_maps and not uses & {"token_targets", "teacher_logits"}:
        raise ConfigError(f"data.label_maps: {name} does not use label maps; set objective=token_labeling.")
    if taught and not uses & taught:
        raise ConfigError(f"teacher: {name} does not use a teacher; set objective=distillation.")
    if taught and has_maps and "token_targets" not in uses:
        raise ConfigError(
            "data.label_maps: already contain a teacher's scores; omit data.label_maps or the teacher (~teacher)."
        )
    mixing_needs = frozenset(getattr(mixing, "needs", ()))
    if "token_targets" in mixing_needs and "token_targets" not in uses:
        raise ConfigError(f"mixing: {mixing.describe()} needs token targets; set objective=token_labeling.")
    if "mixes_tokens" in mixing_needs and not getattr(model, "mixes_tokens", False):
        raise ConfigError(
            f"mixing: {mixing.describe()} needs a backbone that swaps tokens after its stem, such as a ViT, and"
            f" {type(model).__name__} does not; set mixing=mixup_cutmix or mixing=none."
        )


def _check_objective(objective: nn.Module) -> None:
    """Check that an objective declares the needs of the objectives inside it, and the modules that it trains."""
    if not isinstance(objective, nn.Module):
        return
    name, uses = type(objective).__name__, uses_of(objective)
    for part in objective.modules():
        for need in sorted(needs_of(part) - uses):
            raise ConfigError(
                f"objective: {name} contains {type(part).__name__}, so it must also declare the need {need}."
            )
    declared = {id(parameter) for part in trained_parts(objective).values() for parameter in part.parameters()}
    if any(parameter.requires_grad and id(parameter) not in declared for parameter in objective.parameters()):
        raise ConfigError(
            f"objective: {name} has parameters that nothing trains; name their modules in its attribute `trained`."
        )


def _missing(need: str, objective: str, model: nn.Module, outputs: frozenset[str]) -> str:
    """Return the error message for a missing need: what is missing, and how to provide it."""
    backbone = type(model).__name__
    if need == "outputs.tokens":
        return (
            f"objective: {objective} needs token logits, which {backbone} does not have; set model.token_head=true or"
            " choose one of lvvit_t to lvvit_l."
        )
    if need == "outputs.features":
        return f"objective: {objective} needs patch features, which {backbone} does not return; use a backbone of timm."
    if need.startswith("outputs."):
        return f"objective: {objective} needs {need}; {backbone} has {', '.join(sorted(outputs))}."
    if need == "token_targets":
        return (
            f"data.label_maps: not set, but {objective} needs token targets; set data.label_maps, or"
            " objective=cross_entropy to train every token on the image's label."
        )
    if need == "teacher_logits":
        return f"teacher: not set, but {objective} needs a teacher; set teacher=regnety_160 (DeiT's), for example."
    if need == "teacher_heads":
        return f"teacher: not set, but {objective} needs a teacher with token logits; set teacher=timm teacher.name=..."
    if need == "teacher_features":
        return f"teacher: not set, but {objective} needs a teacher's features; set teacher=timm teacher.name=..."
    known = ", ".join((*TARGET_NEEDS, "outputs.<name>"))
    return f"objective: {objective} needs {need}, which nothing provides; known needs are {known}."
