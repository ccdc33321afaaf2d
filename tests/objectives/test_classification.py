import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy as TimmBCE
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.testing import assert_close

from vitrail.objectives import BinaryCrossEntropy, CrossEntropy
from vitrail.types import Outputs, Targets

torch.manual_seed(0)
LOGITS, LABELS, LAM = torch.randn(6, 9), torch.randint(0, 9, (6,)), 0.3
MIXED = mixup_target(LABELS, 9, LAM, 0.0)


def test_cross_entropy__equals_timm_on_indices():
    loss = CrossEntropy(0.1)(Outputs(LOGITS), Targets(LABELS))["loss"]
    assert_close(loss, LabelSmoothingCrossEntropy(0.1)(LOGITS, LABELS))


def test_cross_entropy__smoothing_after_mixing_equals_smoothing_before():
    loss = CrossEntropy(0.1)(Outputs(LOGITS), Targets(MIXED))["loss"]
    assert_close(loss, SoftTargetCrossEntropy()(LOGITS, mixup_target(LABELS, 9, LAM, 0.1)))


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy__equals_timm(threshold, sum_classes):
    timm_loss = TimmBCE(smoothing=0.1, target_threshold=threshold, sum_classes=sum_classes)
    ours = BinaryCrossEntropy(0.1, threshold, sum_classes)
    assert_close(ours(Outputs(LOGITS), Targets(LABELS))["loss"], timm_loss(LOGITS, LABELS))
    expected = timm_loss(LOGITS, mixup_target(LABELS, 9, LAM, 0.1))
    assert_close(ours(Outputs(LOGITS), Targets(MIXED))["loss"], expected)


def test_distilled_model__both_heads_learn_the_label():
    cls, distill = LOGITS.clone().requires_grad_(), (2 * LOGITS).clone().requires_grad_()
    loss = CrossEntropy()(Outputs(cls, distill=distill), Targets(LABELS))["loss"]
    loss.backward()
    one = CrossEntropy()(Outputs(LOGITS), Targets(LABELS))["loss"]
    other = CrossEntropy()(Outputs(2 * LOGITS), Targets(LABELS))["loss"]
    assert_close(loss.detach(), (one + other) / 2)
    assert distill.grad.abs().sum() > 0


def test_smoothing__invalid_values():
    with pytest.raises(ValueError, match=r"objective.smoothing=0.1 with objective.threshold=0"):
        BinaryCrossEntropy(0.1, 0.0)
    with pytest.raises(ValueError, match=r"smoothing=1.0: must be"):
        CrossEntropy(1.0)


@pytest.mark.parametrize("objective", [CrossEntropy(0.1), BinaryCrossEntropy()])
@pytest.mark.parametrize("mixed", [False, True])
def test_token_logits__learn_the_label_of_the_image(objective, mixed):
    torch.manual_seed(0)
    cls, tokens = torch.randn(4, 5), torch.randn(4, 3, 5)
    target = torch.rand(4, 5).softmax(-1) if mixed else torch.randint(0, 5, (4,))
    loss = objective(Outputs(cls, tokens), Targets(target))["loss"]
    each = [objective(Outputs(logits), Targets(target))["loss"] for logits in (cls, *tokens.unbind(1))]
    torch.testing.assert_close(loss, (each[0] + torch.stack(each[1:]).mean()) / 2)


def test_merged_logits__mean_of_heads_plus_half_the_token_maximum():
    cls, distill = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    tokens = torch.tensor([[[0.0, 4.0], [2.0, -1.0]]])
    assert Outputs(cls).merged().tolist() == [[1, 2]]
    assert Outputs(cls, None, distill).merged().tolist() == [[2, 1]]
    assert Outputs(cls, tokens, distill).merged().tolist() == [[3, 3]]
