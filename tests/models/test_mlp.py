import copy

import pytest
import torch
from timm.layers import Mlp

from vitrail.models.mlp import LeanMlp


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_lean_mlp__is_timms(precision, drop):
    torch.manual_seed(0)
    lean = LeanMlp(8, 24, drop=drop).train()
    plain = copy.deepcopy(lean)
    plain.__class__ = Mlp
    results = []
    for mlp in (lean, plain):
        torch.manual_seed(1)
        x = torch.linspace(-3, 3, 80).reshape(2, 5, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            out = mlp(x)
        assert out.dtype == precision
        out.float().square().sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in mlp.parameters())])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_lean_mlp__keeps_the_hidden_layer_once():
    kept = []
    lean = LeanMlp(8, 800)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        lean(torch.randn(2, 5, 8, requires_grad=True))
    assert sum(shape == (2, 5, 800) for shape in kept) == 1
