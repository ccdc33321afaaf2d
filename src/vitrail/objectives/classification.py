"""Classification losses of the published recipes, for class indices (B,) or mixed probabilities (B, C).

Label smoothing is applied only here. It is linear, so smoothing after mixup or CutMix gives the same targets as timm's
smoothing before it.

Shapes: B images, N patch tokens, C classes, M rows of logits (B, or B * N for patch tokens).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.objectives.contract import Objective
from vitrail.types import Outputs, Targets
from vitrail_runtime.checking import Rate, Share, checked


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return class indices (B,) as float32 probabilities (B, C).

    PyTorch's function also reads the smallest and the largest label, for which the host waits on some devices.
    """
    rows = torch.zeros(*labels.shape, num_classes, device=labels.device)
    return rows.scatter_(-1, labels.unsqueeze(-1), 1.0)


def _pairs(outputs: Outputs, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair the logits (M, C) of each head with the image's label.

    Without a teacher, the distillation token learns the label. Without label maps, so does every patch token, as in the
    official token-labelling loss for a target of two dimensions. Otherwise these heads would stay untrained.
    """
    pairs = [(outputs.cls, target)]
    if outputs.distill is not None:
        pairs.append((outputs.distill, target))
    if outputs.tokens is not None:
        pairs.append((outputs.tokens.flatten(0, 1), target.repeat_interleave(outputs.tokens.shape[1], dim=0)))
    return pairs


@checked
class CrossEntropy(Objective):
    """Softmax cross-entropy with label smoothing (Szegedy et al., arXiv:1512.00567), mean over the batch.

    Args:
        smoothing: probability mass spread evenly over all classes, in [0, 1).
    """

    def __init__(self, smoothing: Rate = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` from logits (B, C) and targets (B,) or (B, C)."""
        pairs = _pairs(outputs, targets.cls)
        losses = [F.cross_entropy(logits, target, label_smoothing=self.smoothing) for logits, target in pairs]
        return {"loss": torch.stack(losses).mean()}


@checked
class BinaryCrossEntropy(Objective):
    """Sigmoid cross-entropy, one binary problem per class, as in "ResNet strikes back" (arXiv:2110.00476) and DeiT-III.

    Args:
        smoothing: probability mass spread evenly over all classes before the threshold, in [0, 1).
        threshold: targets above it become 1, the others 0; None keeps them soft. DeiT-III uses 0 (arXiv:2204.07118);
            any smoothing would then set every target to 1, so that combination is an error.
        sum_classes: sum over the classes (big_vision) instead of taking the mean (timm, DeiT-III).
    """

    def __init__(self, smoothing: Rate = 0.0, threshold: Share | None = None, sum_classes: bool = False) -> None:
        super().__init__()
        if threshold == 0 and smoothing > 0:
            raise ValueError(
                f"objective.smoothing={smoothing} with objective.threshold=0 sets the target of every class to 1;"
                " set smoothing to 0 or threshold to null."
            )
        self.smoothing, self.threshold, self.sum_classes = smoothing, threshold, sum_classes

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` from logits (B, C) and targets (B,) or (B, C)."""
        losses = [self._loss(logits, target) for logits, target in _pairs(outputs, targets.cls)]
        return {"loss": torch.stack(losses).mean()}

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        num_classes = logits.shape[-1]
        if target.ndim == 1:
            target = one_hot(target, num_classes)
        target = target.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / num_classes
        if self.threshold is not None:
            target = (target > self.threshold).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (loss.sum(-1) if self.sum_classes else loss.mean(-1)).mean()
