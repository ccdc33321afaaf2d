import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vitrail.objectives import CosubLoss, DistillationLoss, EvoViTLoss
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
