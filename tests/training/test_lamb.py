"""LAMB for all parameters at once equals timm's loop over the parameters."""

import copy

import pytest
import torch
from timm.optim import Lamb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.training import OptimizerFactory
from vitrail.training.lamb import ForeachLamb


def trained(model, optimizer, gradients):
    """Return the parameters after one update for each set of gradients."""
    for grads in gradients:
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return list(model.parameters())


def setting(steps=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    gradients = [[scale * torch.randn_like(p) for p in model.parameters()] for scale in (0.1, 3.0, 1.0, 10.0, 0.01)]
    return model, gradients[:steps]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": None},
        {"trust_clip": True, "always_adapt": True},
        {"decoupled_decay": True},
        {"decoupled_decay": True, "corrected_weight_decay": True},
        {"bias_correction": False, "grad_averaging": False},
    ],
    ids=str,
)
def test_update__equals_timm(options):
    model, gradients = setting()
    groups = [{"params": [model[0].weight, model[2].weight]}]
    groups += [{"params": [model[0].bias, *model[1].parameters(), model[2].bias], "weight_decay": 0.0}]
    theirs = copy.deepcopy(model)
    timm_groups = [{"params": [theirs[0].weight, theirs[2].weight]}]
    timm_groups += [{"params": [theirs[0].bias, *theirs[1].parameters(), theirs[2].bias], "weight_decay": 0.0}]
    ours = trained(model, ForeachLamb(groups, lr=0.1, weight_decay=0.05, **options), gradients)
    expected = trained(theirs, Lamb(timm_groups, lr=0.1, weight_decay=0.05, **options), gradients)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [0, 2])
def test_found_inf__leaves_everything_as_it_is(bad):
    model, gradients = setting()
    other = copy.deepcopy(model)
    optimizer = ForeachLamb(model.parameters(), lr=0.1)
    not_numbers = [torch.full_like(grad, torch.nan) for grad in gradients[0]]
    for number, grads in enumerate([*gradients[:bad], not_numbers, *gradients[bad:]]):
        optimizer.found_inf = torch.tensor(float(number == bad))
        trained(model, optimizer, [grads])
    expected = trained(other, ForeachLamb(other.parameters(), lr=0.1), gradients)
    assert all(map(torch.equal, model.parameters(), expected))
    assert optimizer.param_groups[0]["step"] == len(gradients)


def test_update__has_as_many_operators_for_many_parameters():
    """Also for convolutions with channels in the last place of the memory; views are free on a device."""
    free = {"as_strided", "expand", "unbind", "split", "split_with_sizes", "detach", "alias"}

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func).split(".")[1]
            self.found += [name] * (name not in free)
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 20):
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(layers))).to(memory_format=torch.channels_last)
        optimizer = ForeachLamb(model.parameters(), lr=0.1, weight_decay=0.1)
        grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(2)]
        trained(model, optimizer, grads[:1])  # makes the moments
        for parameter, grad in zip(model.parameters(), grads[1], strict=True):
            parameter.grad = grad
        with Operators() as operators:
            optimizer.step()
        counts.append(len(operators.found))
    assert counts[0] == counts[1]


def test_state__is_that_of_timm():
    """A training continues with either implementation."""
    model, gradients = setting()
    factory = OptimizerFactory("lamb", 0.1, lr_scaling="none")
    other = copy.deepcopy(model)
    first = factory.build(model, 1)
    trained(model, first, gradients[:3])
    fused = OptimizerFactory("lamb", 0.1, lr_scaling="none", fused=True).build(other, 1)
    assert isinstance(fused, ForeachLamb)
    other.load_state_dict(model.state_dict())
    fused.load_state_dict(copy.deepcopy(first.state_dict()))
    ours = trained(other, fused, gradients[3:])
    torch.testing.assert_close(ours, trained(model, first, gradients[3:]), rtol=1e-5, atol=1e-6)
