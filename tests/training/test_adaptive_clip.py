import copy

import pytest
import timm
import torch
from timm.utils import adaptive_clip_grad
from torch import nn

from vitrail.errors import ArgumentError
from vitrail.training import AdaptiveClip


def clipped(factor):
    """Return a layer whose gradients have been clipped."""
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]))
        layer.bias.fill_(1.0)
    layer.weight.grad, layer.bias.grad = torch.tensor([[0.0, 10.0], [2.0, 0.0], [0.1, 0.0]]), torch.ones(3)
    AdaptiveClip(factor).on_before_optimizer_step(None, None, torch.optim.SGD(layer.parameters()))
    return layer


def test_gradients__have_at_most_a_share_of_each_rows_norm():
    """Rows have the norms 5, 0 (counted as 0.001) and 10; the bias is one unit of norm sqrt(3)."""
    layer = clipped(0.1)
    expected = torch.tensor([[0.0, 0.5], [1e-4, 0.0], [0.1, 0.0]])
    torch.testing.assert_close(layer.weight.grad, expected)
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 0.1))


def test_gradients__equal_those_of_timm():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    other = copy.deepcopy(model)
    for value, twin in zip(model.parameters(), other.parameters(), strict=True):
        twin.grad = value.grad.clone()
    AdaptiveClip(0.01).on_before_optimizer_step(None, None, torch.optim.SGD(model.parameters()))
    adaptive_clip_grad(other.parameters(), 0.01)
    for value, twin in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value.grad, twin.grad)


def test_factor__none_does_not_clip():
    assert clipped(None).weight.grad[0, 1] == 10
    with pytest.raises(ArgumentError, match="factor"):
        AdaptiveClip(0.0)
