import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy as TimmBCE
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.testing import assert_close

from vitrail.objectives import BinaryCrossEntropy, CrossEntropy
from vitrail.types import Heads, Targets

torch.manual_seed(0)
LOGITS, LABELS, LAM = torch.randn(6, 9), torch.randint(0, 9, (6,)), 0.3
MIXED = mixup_target(LABELS, 9, LAM, 0.0)


def test_cross_entropy__equals_timm_on_indices():
    loss = CrossEntropy(0.1)(Heads(LOGITS), Targets(LABELS))["loss"]
    assert_close(loss, LabelSmoothingCrossEntropy(0.1)(LOGITS, LABELS))


def test_cross_entropy__smoothing_after_mixing_equals_timms_before():
    loss = CrossEntropy(0.1)(Heads(LOGITS), Targets(MIXED))["loss"]
    assert_close(loss, SoftTargetCrossEntropy()(LOGITS, mixup_target(LABELS, 9, LAM, 0.1)))


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy__equals_timm(threshold, sum_classes):
    timm_loss = TimmBCE(smoothing=0.1, target_threshold=threshold, sum_classes=sum_classes)
    ours = BinaryCrossEntropy(0.1, threshold, sum_classes)
    assert_close(ours(Heads(LOGITS), Targets(LABELS))["loss"], timm_loss(LOGITS, LABELS))
    expected = timm_loss(LOGITS, mixup_target(LABELS, 9, LAM, 0.1))
    assert_close(ours(Heads(LOGITS), Targets(MIXED))["loss"], expected)


def test_distilled__both_heads_learn_the_label():
    cls, distill = LOGITS.clone().requires_grad_(), (2 * LOGITS).clone().requires_grad_()
    loss = CrossEntropy()(Heads(cls, distill=distill), Targets(LABELS))["loss"]
    loss.backward()
    one = CrossEntropy()(Heads(LOGITS), Targets(LABELS))["loss"]
    other = CrossEntropy()(Heads(2 * LOGITS), Targets(LABELS))["loss"]
    assert_close(loss.detach(), (one + other) / 2)
    assert distill.grad.abs().sum() > 0


def test_refuses__what_makes_every_class_positive():
    with pytest.raises(ValueError, match=r"objective.smoothing=0.1 with objective.threshold=0"):
        BinaryCrossEntropy(0.1, 0.0)
    with pytest.raises(ValueError, match=r"objective.smoothing=1.0"):
        CrossEntropy(1.0)
