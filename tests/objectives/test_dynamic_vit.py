import pytest
import torch
from torch.testing import assert_close

from vitrail.objectives import CosubLoss, CrossEntropy, DynamicViTLoss, TokenLabelingLoss
from vitrail.types import Outputs, Targets

LABELS = torch.tensor([1, 0])


def outputs():
    torch.manual_seed(0)
    extras = {"decisions": torch.tensor([[[1.0, 1, 0, 0]], [[1, 1, 1, 1]]]), "features": torch.randn(2, 4, 6)}
    return Outputs(torch.randn(2, 3), torch.randn(2, 4, 3), extras=extras)


def test_needs__follow_the_options():
    assert DynamicViTLoss().needs == {"outputs.decisions", "outputs.features", "teacher_logits", "teacher_features"}
    assert DynamicViTLoss(token_loss="kl").needs == {"outputs.decisions", "outputs.tokens", "teacher_heads"}
    assert DynamicViTLoss(distill_weight=0).needs == {"outputs.decisions"}
    assert "token_targets" in DynamicViTLoss(base=TokenLabelingLoss()).needs


def test_without_teacher__label_and_ratio_on_the_merged_logits():
    loss = DynamicViTLoss(0.5, ratio_weight=4.0, distill_weight=0)(outputs(), Targets(LABELS))
    assert loss["ratio_loss"] == pytest.approx((0 + 0.25) / 2)
    label = CrossEntropy(0.1)(Outputs(outputs().merged()), Targets(LABELS))["loss"]
    assert_close(loss["loss"], label + 4 * loss["ratio_loss"])
    batch = DynamicViTLoss(0.5, distill_weight=0, per_image=False)(outputs(), Targets(LABELS))
    assert batch["ratio_loss"] == pytest.approx(0.0625)
    third = DynamicViTLoss(0.5, distill_weight=0, ratio_divisor=3)(outputs(), Targets(LABELS))
    assert third["ratio_loss"] == pytest.approx(0.125 / 3)


def test_token_loss__of_kept_tokens_only():
    given, wanted = outputs(), torch.randn(2, 4, 6)
    targets = Targets(LABELS, None, torch.randn(2, 3), wanted)
    kept = given.extras["decisions"][:, -1] > 0.5
    expected = (given.extras["features"][kept] - wanted[kept]).square().mean()
    assert_close(DynamicViTLoss()(given, targets)["token_loss"], expected)
    nothing = given._replace(extras={**given.extras, "decisions": torch.zeros(2, 1, 4)})
    assert DynamicViTLoss()(nothing, targets)["token_loss"] == 0


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        ({"keep_ratio": [0.7, 0.5]}, Targets(LABELS), "objective.keep_ratio: 2 ratios for 1 stages"),
        ({}, Targets(LABELS), "needs a teacher's logits and features"),
        ({"token_loss": "kl"}, Targets(LABELS), "needs a teacher with token logits"),
        (
            {},
            Targets(LABELS, None, torch.zeros(2, 3), torch.zeros(2, 9, 6)),
            r"teacher: has features of shape \(9, 6\)",
        ),
    ],
)
def test_errors__name_what_does_not_fit(options, targets, message):
    with pytest.raises(ValueError, match=message):
        DynamicViTLoss(**options)(outputs(), targets)


def test_base__must_use_one_pass():
    with pytest.raises(ValueError, match=r"objective.base: must use one forward pass"):
        DynamicViTLoss(base=CosubLoss())
