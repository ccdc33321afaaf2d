import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vitrail.objectives import CosubLoss, CrossEntropy, DistillationLoss, EvoViTLoss
from vitrail.types import Outputs, Targets

torch.manual_seed(0)
CLS, TOKEN, TEACHER, LABELS = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
OUTPUTS = Outputs(CLS, extras={"class_token": TOKEN})


def test_loss__of_both_classifiers():
    loss = EvoViTLoss(class_token_weight=0.25)(OUTPUTS, Targets(LABELS))
    mean, token = (F.cross_entropy(logits, LABELS, label_smoothing=0.1) for logits in (CLS, TOKEN))
    assert_close(loss["loss"], 0.75 * mean + 0.25 * token)
    assert_close(loss["class_token_loss"], token)


def test_base__may_learn_from_a_teacher():
    objective = EvoViTLoss(base=DistillationLoss())
    assert objective.needs == {"outputs.class_token", "teacher_logits"}
    loss = objective(OUTPUTS, Targets(LABELS, teacher_logits=TEACHER))["loss"]
    losses = [DistillationLoss()(Outputs(logits), Targets(LABELS, teacher_logits=TEACHER)) for logits in (CLS, TOKEN)]
    assert_close(loss, (losses[0]["loss"] + losses[1]["loss"]) / 2)


def test_base__must_use_one_pass():
    with pytest.raises(ValueError, match=r"objective.base: must use one forward pass"):
        EvoViTLoss(base=CosubLoss())


@pytest.mark.parametrize("base", [DistillationLoss(), CrossEntropy()])
def test_base__gets_the_second_classifier_of_each_token(base):
    """With a teacher it learns the teacher's class, without one the label."""
    second, token_second = CLS.flip(0), TOKEN.flip(0)
    outputs = Outputs(CLS, distill=second, extras={"class_token": TOKEN, "class_token_distill": token_second})
    targets = Targets(LABELS, teacher_logits=TEACHER)
    pairs = (Outputs(CLS, distill=second), Outputs(TOKEN, distill=token_second))
    assert_close(
        EvoViTLoss(base=base)(outputs, targets)["loss"], sum(base(pair, targets)["loss"] for pair in pairs) / 2
    )
    if "teacher_logits" in base.needs:
        labels = sum(F.cross_entropy(logits, LABELS, label_smoothing=0.1) for logits in (CLS, TOKEN))
        taught = sum(F.cross_entropy(logits, TEACHER.argmax(-1)) for logits in (second, token_second))
        assert_close(EvoViTLoss(base=base)(outputs, targets)["loss"], 0.25 * labels + 0.25 * taught)
