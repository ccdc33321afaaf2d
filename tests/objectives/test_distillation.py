import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vitrail.objectives import CrossEntropy, DistillationLoss
from vitrail.types import Outputs, Targets

torch.manual_seed(0)
CLS, DISTILL, TEACHER, LABELS = torch.randn(5, 7), torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))


def test_soft__as_in_the_paper():
    """The loss is the mean over images of KL(teacher || student) at temperature tau, times tau squared."""
    loss = DistillationLoss("soft", 1.0, 2.0, per_class=False)(
        Outputs(CLS, distill=DISTILL), Targets(LABELS, teacher_logits=TEACHER)
    )
    p, q = (TEACHER / 2).softmax(-1), (DISTILL / 2).softmax(-1)
    assert_close(loss["loss"], 4 * (p * (p / q).log()).sum(-1).mean())


def test_no_distillation_token__class_token_learns_both():
    loss = DistillationLoss("hard", 0.3)(Outputs(CLS), Targets(LABELS, teacher_logits=TEACHER))
    label, teacher = CrossEntropy(0.1)(Outputs(CLS), Targets(LABELS))["loss"], F.cross_entropy(CLS, TEACHER.argmax(-1))
    assert_close(loss["loss"], 0.7 * label + 0.3 * teacher)
    assert_close(loss["distill_loss"], teacher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "warm"}, "objective.kind=warm: choose hard or soft."),
        ({"alpha": 1.5}, r"objective.alpha=1.5: must lie in \[0, 1\]"),
        ({"tau": 0}, "objective.tau=0: must be positive."),
    ],
)
def test_distillation__invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**arguments)
    with pytest.raises(ValueError, match="needs teacher logits"):
        DistillationLoss()(Outputs(CLS), Targets(LABELS))
