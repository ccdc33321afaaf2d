"""Loss of DynamicViT (Rao et al., "DynamicViT", arXiv:2106.02034, section 3.3).

Shapes: B images, N patch tokens, S stages, D channels, C classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.objectives.classification import CrossEntropy
from vitrail.objectives.contract import Objective, needs_of, optional_of, outputs_for, passes_of
from vitrail.types import Outputs, Targets
from vitrail_runtime.checking import NonNegative, PositiveInt, checked


@checked
class DynamicViTLoss(Objective):
    """cls_loss + ratio_weight * ratio_loss + distill_weight * (distill_loss + token_loss).

    - `ratio_loss`: squared difference between the share of patch tokens kept and the stage's ratio, mean over images
      and stages.
    - `distill_loss`: Kullback-Leibler divergence of the class logits from the teacher's, at temperature 1.
    - `token_loss`: difference between the patch tokens that the last stage keeps and the teacher's.

    Equal to the official code (github.com/raoyongming/DynamicViT, `losses.py`).

    Args:
        keep_ratio: the backbone's: r for r, r^2, ... of all patch tokens, or one share for each stage.
        ratio_weight: weight of the ratio loss.
        distill_weight: weight of the teacher; 0 trains without one, on the merged logits of the backbone.
        token_loss: `mse`: mean squared error of the final features, over tokens and channels (DeiT); `kl`: divergence
            of the token logits, mean over tokens (LV-ViT). With `kl` the teacher must have token logits.
        per_image: compare the ratio for each image, as published; False compares it for the whole batch.
        ratio_divisor: divisor of the sum over stages; None: their number. The official code has 3 for any number.
        base: loss of the class logits with the label; None means cross-entropy with smoothing 0.1.

    Raises:
        ValueError: a value is out of range, or `base` needs several passes.
    """

    def __init__(
        self,
        keep_ratio: float | Sequence[float] = 0.7,
        ratio_weight: NonNegative = 2.0,
        distill_weight: NonNegative = 0.5,
        token_loss: Literal["mse", "kl"] = "mse",
        per_image: bool = True,
        ratio_divisor: PositiveInt | None = None,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.keep_ratio, self.ratio_weight, self.distill_weight = keep_ratio, ratio_weight, distill_weight
        self.token_loss, self.per_image, self.ratio_divisor = token_loss, per_image, ratio_divisor
        self.base = base or CrossEntropy(smoothing=0.1)
        if passes_of(self.base) > 1:
            raise ValueError("objective.base: must use one forward pass per image.")
        taught = {
            "mse": {"outputs.features", "teacher_logits", "teacher_features"},
            "kl": {"outputs.tokens", "teacher_heads"},
        }
        self.needs = needs_of(self.base) | {"outputs.decisions"} | (taught[token_loss] if distill_weight else set())
        self.optional = optional_of(self.base)

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` and its parts from logits (B, C), decisions (B, S, N) and targets.

        Raises:
            ValueError: the number of stages does not fit `keep_ratio`, or the targets lack the teacher's part.
        """
        ratio_loss = self._ratio_loss(outputs.extras["decisions"])
        if not self.distill_weight:
            cls_loss = self.base(Outputs(outputs.merged()), targets)["loss"]
            loss = cls_loss + self.ratio_weight * ratio_loss
            return {"loss": loss, "cls_loss": cls_loss, "ratio_loss": ratio_loss}
        cls_loss = self.base(outputs_for(self.base, outputs), targets)["loss"]
        teacher, token_errors = self._teacher(outputs, targets)
        distill_loss = _divergence(outputs.cls, teacher).mean()
        kept = (outputs.extras["decisions"][:, -1].detach() > 0.5).float()  # (B, N)
        token_loss = (token_errors * kept).sum() / kept.sum().clamp(min=1)
        loss = cls_loss + self.ratio_weight * ratio_loss + self.distill_weight * (distill_loss + token_loss)
        parts = {"cls_loss": cls_loss, "ratio_loss": ratio_loss}
        return {"loss": loss, **parts, "distill_loss": distill_loss, "token_loss": token_loss}

    def _ratio_loss(self, decisions: Tensor) -> Tensor:
        """Return the mean squared difference between the kept shares of decisions (B, S, N) and the ratios."""
        stages, single = decisions.shape[1], isinstance(self.keep_ratio, int | float)
        ratios = [self.keep_ratio ** (stage + 1) for stage in range(stages)] if single else list(self.keep_ratio)  # type: ignore
        if len(ratios) != stages:
            raise ValueError(f"objective.keep_ratio: {len(ratios)} ratios for {stages} stages; set the backbone's.")
        kept = decisions.float().mean(2)  # (B, S)
        kept = kept if self.per_image else kept.mean(0, keepdim=True)
        # One by one: a tensor of the ratios would be copied to the device, and a GPU would wait for it.
        errors = torch.stack([kept[:, stage] - ratio for stage, ratio in enumerate(ratios)], 1)  # (B, S)
        errors = errors.square().mean(0)  # (S,)
        return errors.sum() / (self.ratio_divisor or stages)

    def _teacher(self, outputs: Outputs, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return the teacher's class logits (B, C), and the error of each patch token (B, N)."""
        if self.token_loss == "mse":
            if targets.teacher_logits is None or targets.teacher_features is None:
                raise ValueError("objective: DynamicViT needs a teacher's logits and features; set teacher=...")
            features, wanted = outputs.extras["features"].float(), targets.teacher_features.float()
            if features.shape != wanted.shape:
                raise ValueError(
                    f"teacher: has features of shape {tuple(wanted.shape[1:])}, the backbone's are"
                    f" {tuple(features.shape[1:])}; use the dense backbone as teacher."
                )
            return targets.teacher_logits, F.mse_loss(features, wanted, reduction="none").mean(-1)
        heads = targets.teacher_heads
        if heads is None or heads.tokens is None or outputs.tokens is None:
            raise ValueError(
                "objective.token_loss=kl: needs a teacher with token logits, such as teacher.name=lvvit_s."
            )
        return heads.cls, _divergence(outputs.tokens, heads.tokens)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence (...) of logits (..., C) from the teacher's."""
    logs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
