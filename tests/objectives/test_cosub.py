import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.objectives import CosubLoss, CrossEntropy
from vitrail.runs.assembly import check_passes
from vitrail.types import Outputs, Targets


def published(logits, targets):
    """Return the loss of the official training loop."""
    first, second = logits.chunk(2)
    loss = nn.BCEWithLogitsLoss()
    binary = (targets > 0).float()
    with_labels = loss(first, binary) + loss(second, binary)
    with_others = loss(first, second.detach().sigmoid()) + loss(second, first.detach().sigmoid())
    return 0.25 * with_labels + 0.25 * with_others


def test_loss_and_gradient__as_published():
    torch.manual_seed(0)
    logits = torch.randn(8, 10, requires_grad=True)
    again = logits.detach().clone().requires_grad_()
    targets = torch.zeros(4, 10)
    targets[range(4), [1, 2, 3, 4]], targets[range(4), [5, 2, 0, 9]] = 0.7, 0.3  # mixed
    losses = CosubLoss()(Outputs(logits), Targets(targets))
    expected = published(again, targets)
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, again.grad)
    torch.testing.assert_close(losses["loss"], (losses["label_loss"] + losses["cosub_loss"]) / 2)


def test_loss__class_indices_other_base_and_two_heads():
    logits, distill, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2])
    losses = CosubLoss(weight=0.2, base=CrossEntropy(0.1))(Outputs(logits, distill=distill), Targets(labels))
    smooth = lambda x: F.cross_entropy(x, labels, label_smoothing=0.1)  # noqa: E731
    expected = sum(smooth(part) for head in (logits, distill) for part in head.chunk(2)) / 4
    torch.testing.assert_close(losses["label_loss"], expected)
    other = [F.binary_cross_entropy_with_logits(a, b.sigmoid())
             for head in (logits, distill) for a, b in (head.chunk(2), head.chunk(2)[::-1])]  # fmt: skip
    torch.testing.assert_close(losses["cosub_loss"], torch.stack(other).mean())
    torch.testing.assert_close(losses["loss"], 0.8 * losses["label_loss"] + 0.2 * losses["cosub_loss"])
    with pytest.raises(ValueError, match=r"weight=2: must be a number of at least 0 and at most 1"):
        CosubLoss(weight=2)


def test_submodels__differ_only_by_stochastic_depth():
    images = torch.randn(4, 3, 16, 16).repeat(2, 1, 1, 1)
    model = create_model("vit_nano", 10, 16, drop_path_rate=0.5).train()
    check_passes(model, CosubLoss())
    first, second = forward_heads(model, images).cls.chunk(2)
    assert (first - second).abs().amax() > 1e-3
    same = create_model("vit_nano", 10, 16, drop_path_rate=0.0).train()
    with pytest.raises(ConfigError, match=r"model\.drop_path_rate=0: the 2 passes of CosubLoss would be identical"):
        check_passes(same, CosubLoss())
    check_passes(same, CrossEntropy())
