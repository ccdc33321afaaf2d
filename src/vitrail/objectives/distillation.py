"""Knowledge distillation (Touvron et al., arXiv:2012.12877, section 4; Hinton et al., arXiv:1503.02531).

Shapes: B images, C classes.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.objectives.classification import CrossEntropy
from vitrail.objectives.contract import Objective, needs_of, optional_of, outputs_for, passes_of
from vitrail.types import Outputs, Targets
from vitrail_runtime.checking import Positive, Share, checked


@checked
class DistillationLoss(Objective):
    """(1 - alpha) * loss of the class token with the label + alpha * loss of the distillation token with the teacher.

    Backbones without a distillation token use the class token for both, the paper's "usual distillation". Equal to the
    official code (github.com/facebookresearch/deit, `losses.py`).

    Args:
        kind: `hard`: cross-entropy with the teacher's top class; `soft`: Kullback-Leibler divergence from the teacher's
            probabilities, both at temperature `tau`, times `tau` squared.
        alpha: weight of the teacher, in [0, 1].
        tau: temperature of `soft`; `hard` ignores it, as published.
        per_class: divide `soft` also by the number of classes, as the official code does; with 1000 classes this
            divides the teacher's weight by 1000. False means the paper's mean over images.
        base: loss of the class token with the label; None means cross-entropy with smoothing 0.1.

    Raises:
        ValueError: the kind is unknown, a value is out of range, or `base` needs several passes.
    """

    def __init__(
        self,
        kind: Literal["hard", "soft"] = "hard",
        alpha: Share = 0.5,
        tau: Positive = 1.0,
        per_class: bool = True,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.alpha, self.tau, self.per_class = kind, alpha, tau, per_class
        self.base = base or CrossEntropy(smoothing=0.1)
        if passes_of(self.base) > 1:
            raise ValueError("objective.base: must use one forward pass per image.")
        self.needs = frozenset({"teacher_logits"}) | needs_of(self.base)
        self.optional = optional_of(self.base)

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` and its parts `cls_loss` and `distill_loss` from student and teacher logits (B, C).

        Raises:
            ValueError: the targets contain no teacher logits.
        """
        if targets.teacher_logits is None:
            raise ValueError("objective: distillation needs teacher logits; set teacher=...")
        cls_loss = self.base(outputs_for(self.base, outputs), targets)["loss"]
        student = (outputs.cls if outputs.distill is None else outputs.distill).float()
        teacher = targets.teacher_logits.float()
        if self.kind == "hard":
            distill_loss = F.cross_entropy(student, teacher.argmax(-1))
        else:
            log_student = (student / self.tau).log_softmax(-1)
            log_teacher = (teacher / self.tau).log_softmax(-1)
            divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
            distill_loss = divergence * self.tau**2 / (student.numel() if self.per_class else len(student))
        loss = (1 - self.alpha) * cls_loss + self.alpha * distill_loss
        return {"loss": loss, "cls_loss": cls_loss, "distill_loss": distill_loss}
