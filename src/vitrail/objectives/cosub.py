"""Co-training of two submodels (Touvron et al., "Co-training 2L Submodels", arXiv:2212.04884).

Shapes: B images, N patch tokens, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.objectives.classification import BinaryCrossEntropy
from vitrail.objectives.contract import Objective, needs_of, optional_of, passes_of
from vitrail.types import Outputs, Targets
from vitrail_runtime.checking import Share, checked


@checked
class CosubLoss(Objective):
    """Loss of two passes per image with different blocks dropped; each pass learns from the label and the other pass.

    loss = (1 - weight) * mean loss with the label + weight * sigmoid cross-entropy with the other pass's probabilities,
    which are detached. With the defaults it equals the official code (github.com/facebookresearch/deit, `engine.py`,
    `--cosub --bce-loss`).

    Args:
        weight: weight of the loss with the other pass, in [0, 1].
        base: loss with the label; None means the sigmoid cross-entropy of DeiT-III, with targets binarised at 0.

    Raises:
        ValueError: the weight is out of range, or `base` needs several passes.
    """

    passes = 2

    def __init__(self, weight: Share = 0.5, base: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.base = base or BinaryCrossEntropy(threshold=0.0)
        if passes_of(self.base) > 1:
            raise ValueError("objective.base: must use one forward pass per image.")
        self.needs, self.optional = needs_of(self.base), optional_of(self.base)

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return `loss` and its parts `label_loss` and `cosub_loss`, all scalar.

        Args:
            outputs: outputs of both passes, concatenated: (2 B, C), (2 B, N, C).
            targets: targets of the B images.
        """
        passes = outputs.chunk(self.passes)
        label_loss = torch.stack([self.base(each, targets)["loss"] for each in passes]).mean()
        cosub_loss = torch.stack(
            [
                F.binary_cross_entropy_with_logits(own, other.detach().sigmoid())
                for mine, others in (passes, passes[::-1])
                for own, other in zip(mine[:3], others[:3], strict=True)
                if own is not None and other is not None
            ]
        ).mean()
        loss = (1 - self.weight) * label_loss + self.weight * cosub_loss
        return {"loss": loss, "label_loss": label_loss, "cosub_loss": cosub_loss}
