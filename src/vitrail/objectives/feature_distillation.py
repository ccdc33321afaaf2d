"""Feature distillation of patch tokens: dense targets from a teacher, without label files.

Follows "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation" (Wei et al.,
arXiv:2205.14141): the teacher's features are normalised per token by a LayerNorm without weights, and the student's
go through a linear projection. Deviations: it accompanies a supervised loss instead of preceding it, and the distance
is the cosine or the mean squared error instead of a smooth L1 loss.

Shapes: B images, N patch tokens, D channels of the student, T channels of the teacher.
"""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.objectives.classification import CrossEntropy
from vitrail.objectives.contract import Objective, needs_of, optional_of, outputs_for, passes_of
from vitrail.types import Outputs, Targets
from vitrail_runtime.checking import NonNegative, checked


@checked
class FeatureDistillation(Objective):
    """Loss with the label + weight * mean distance between each projected patch token and the teacher's features there.

    The projection (D to T channels) is trained and saved with the backbone, and not exported.

    Args:
        kind: `cosine`: 1 - cosine similarity of the projected token and the teacher's normalised features; `mse`: their
            mean squared difference.
        weight: weight of the teacher's loss.
        base: loss with the label; None means cross-entropy with smoothing 0.1.

    Raises:
        ValueError: the kind is unknown, a value is out of range, or `base` needs several passes.
    """

    trained = frozenset({"projection"})

    def __init__(
        self, kind: Literal["cosine", "mse"] = "cosine", weight: NonNegative = 1.0, base: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.kind, self.weight = kind, weight
        self.base = base or CrossEntropy(smoothing=0.1)
        if passes_of(self.base) > 1:
            raise ValueError("objective.base: must use one forward pass per image.")
        self.needs = frozenset({"outputs.features", "teacher_features"}) | needs_of(self.base)
        self.optional = optional_of(self.base)
        self.projection: nn.Module | None = None

    def build_parts(self, widths: Mapping[str, int]) -> None:
        """Build the projection from the student's to the teacher's width, initialised like a ViT's layers."""
        self.projection = nn.Linear(widths["outputs.features"], widths["teacher_features"])
        nn.init.trunc_normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` and its parts `base_loss` and `feature_loss`.

        Args:
            outputs: with patch features (B, N, D) as `extras["features"]`.
            targets: with `teacher_features` (B, N, T) on the same grid.

        Raises:
            ValueError: the features are missing or on different grids, or the projection has not been built.
        """
        features, teacher = outputs.extras.get("features"), targets.teacher_features
        if features is None or teacher is None:
            raise ValueError("objective: feature distillation needs features of the backbone and of a teacher=...")
        if features.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"objective: features {tuple(features.shape)} and the teacher's {tuple(teacher.shape)} are on different"
                " grids; pass the backbone's grid to the teacher."
            )
        if self.projection is None:
            raise ValueError("objective: feature distillation has no projection yet; call build_parts first.")
        projected = self.projection(features).float()  # (B, N, T)
        wanted = F.layer_norm(teacher.float(), teacher.shape[-1:])  # (B, N, T)
        if self.kind == "cosine":
            feature_loss = (1 - F.cosine_similarity(projected, wanted, dim=-1)).mean()
        else:
            feature_loss = F.mse_loss(projected, wanted)
        base_loss = self.base(outputs_for(self.base, outputs), targets)["loss"]
        return {"loss": base_loss + self.weight * feature_loss, "base_loss": base_loss, "feature_loss": feature_loss}
