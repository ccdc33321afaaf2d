import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vitrail.errors import ConfigError
from vitrail.objectives import CosubLoss, CrossEntropy, DistillationLoss, TokenLabelingLoss
from vitrail.objectives.contract import check_losses
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
        ({"kind": "warm"}, "kind=warm: must be one of hard, soft."),
        ({"alpha": 1.5}, r"alpha=1.5: must be a number of at least 0 and at most 1"),
        ({"tau": 0}, "tau=0: must be a number above 0."),
    ],
)
def test_distillation__invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**arguments)
    with pytest.raises(ValueError, match="needs teacher logits"):
        DistillationLoss()(Outputs(CLS), Targets(LABELS))


def test_base__gets_the_outputs_and_targets_that_it_declares():
    base = TokenLabelingLoss()
    loss = DistillationLoss(base=base)
    assert loss.needs == {"teacher_logits", "outputs.tokens", "token_targets"}
    outputs = Outputs(torch.randn(2, 5), torch.randn(2, 4, 5), torch.randn(2, 5))
    targets = Targets(torch.tensor([1, 2]), torch.rand(2, 4, 5), teacher_logits=torch.randn(2, 5))
    assert loss(outputs, targets)["cls_loss"] == base(outputs, targets)["loss"]
    for wrapper in (DistillationLoss, CosubLoss):
        assert "token_targets" in wrapper(base=TokenLabelingLoss(token_weight=0)).optional
        with pytest.raises(ValueError, match=r"objective.base: must use one forward pass"):
            wrapper(base=CosubLoss())


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (torch.ones(()), "objective: CrossEntropy returns Tensor; it must return a dict with the key loss"),
        ({"total": torch.ones(())}, "returns a dict of total; it must"),
        ({"loss": torch.ones(2)}, r"returns shape \(2,\) as loss; it must be a scalar tensor"),
        ({"loss": torch.ones(()), "part": 1.0}, "returns float as part"),
    ],
)
def test_losses__of_the_wrong_kind(losses, message):
    with pytest.raises(ConfigError, match=message):
        check_losses(losses, CrossEntropy())
