"""Loss of Evo-ViT (Xu et al., "Evo-ViT", arXiv:2108.01390), which trains two sets of classifiers.

Shapes: B images, C classes.
"""

from torch import Tensor, nn

from vitrail.objectives.classification import CrossEntropy
from vitrail.objectives.contract import Objective, needs_of, optional_of, outputs_for, passes_of
from vitrail.types import Outputs, Targets
from vitrail_runtime.checking import Share, checked


@checked
class EvoViTLoss(Objective):
    """(1 - class_token_weight) * loss of the mean patch token + class_token_weight * loss of the class token.

    The class token's classifier exists for training only: its loss makes the class token's attention, which selects the
    patch tokens, meaningful. If both have a second classifier for the teacher (Evo-LeViT), `base` gets its logits too,
    as those of a distillation token. Equal to the official code (github.com/YifanXu74/Evo-ViT, `engine_deit.py`,
    `losses_levit.py`).

    Args:
        class_token_weight: weight of the class token, in [0, 1].
        base: loss of each classifier; None means cross-entropy with smoothing 0.1. With a `DistillationLoss` both
            classifiers also learn from the teacher, as published for Evo-LeViT; for the DeiT form the official code
            fails.

    Raises:
        ValueError: the weight is out of range, or `base` needs several passes.
    """

    def __init__(self, class_token_weight: Share = 0.5, base: nn.Module | None = None) -> None:
        super().__init__()
        self.class_token_weight = class_token_weight
        self.base = base or CrossEntropy(smoothing=0.1)
        if passes_of(self.base) > 1:
            raise ValueError("objective.base: must use one forward pass per image.")
        self.needs = needs_of(self.base) | {"outputs.class_token"}
        self.optional = optional_of(self.base)

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` and its parts `cls_loss` and `class_token_loss` from logits (B, C)."""
        mean_token = outputs_for(self.base, outputs)._replace(distill=outputs.distill)
        class_token = Outputs(outputs.extras["class_token"], distill=outputs.extras.get("class_token_distill"))
        cls_loss, class_token_loss = (self.base(heads, targets)["loss"] for heads in (mean_token, class_token))
        loss = (1 - self.class_token_weight) * cls_loss + self.class_token_weight * class_token_loss
        return {"loss": loss, "cls_loss": cls_loss, "class_token_loss": class_token_loss}
