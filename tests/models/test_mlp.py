import copy

import pytest
import torch
from timm.layers import Mlp

from vitrail.models.mlp import LeanMlp


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.2])
@pytest.mark.parametrize("with_norm", [False, True])
def test_lean_mlp__equals_timm(precision, drop, with_norm):
    torch.manual_seed(0)
    lean, norm = LeanMlp(8, 24, drop=drop).train(), torch.nn.LayerNorm(8)
    torch.nn.init.normal_(norm.weight)
    plain = copy.deepcopy(lean)
    plain.__class__ = Mlp
    results = []
    for mlp in (lean, plain):
        torch.manual_seed(1)
        norm.zero_grad()
        x = torch.linspace(-3, 3, 80).reshape(2, 5, 8).sin().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            out = mlp(norm(x)) if mlp is plain and with_norm else mlp(x, norm) if with_norm else mlp(x)
        assert out.dtype == precision
        out.float().square().sum().backward()
        parameters = [*mlp.parameters(), *(norm.parameters() if with_norm else ())]
        results.append([out, x.grad, *(parameter.grad.clone() for parameter in parameters)])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_lean_mlp__stores_the_hidden_layer_once():
    kept, lean, norm = [], LeanMlp(8, 800), torch.nn.LayerNorm(8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        lean(x, norm)
    assert sum(saved.shape == (2, 5, 800) for saved in kept) == 1
    assert sum(saved.shape == (2, 5, 8) for saved in kept) == 1  # x itself, without its normalised copy
