"""Compare the layers of second-order pooling with the official implementation."""

import numpy as np
import pytest
import torch

from peers.recorded import draw, recorded
from vitrail.models.second_order import matrix_sqrt, power_normalize, so_vit_classifier, sot_classifier

PARTS = recorded("second_order_parts.json")


def normal(random, *shape):
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def ids(case):
    return f"seed {case['seed']}"


@pytest.mark.parametrize("case", PARTS["svpn"], ids=ids)
def test_power_normalize__as_official(case):
    random, batch, sizes = np.random.RandomState(case["seed"]), case["B"], (case["d1"], case["d2"])
    x, start = normal(random, batch, *sizes).requires_grad_(), normal(random, sizes[0]).requires_grad_()
    weight = normal(random, batch, sizes[0] * sizes[1])
    out = power_normalize(x, start, case["alpha"], case["iterNum"], case["svNum"]).flatten(1)
    np.testing.assert_allclose(out.detach(), case["output"], rtol=1e-5, atol=1e-6)
    (out * weight).sum().backward()
    assert x.grad.norm().item() == pytest.approx(case["grad_l2_x"], rel=1e-4)
    assert start.grad.norm().item() == pytest.approx(case["grad_l2_v0"], rel=1e-4)


@pytest.mark.parametrize("case", PARTS["mpn"], ids=ids)
def test_matrix_sqrt__as_official(case):
    random, dim = np.random.RandomState(case["seed"]), case["d"]
    factor = normal(random, case["B"], dim, case["n"])
    covariance = (factor @ factor.mT / case["n"]).requires_grad_()
    rows, columns = torch.triu_indices(dim, dim)
    out = matrix_sqrt(covariance, case["iterNum"])[:, rows, columns]
    np.testing.assert_allclose(out.detach(), case["output"], rtol=1e-5, atol=1e-6)
    (out * normal(random, case["B"], len(rows))).sum().backward()
    assert covariance.grad.norm().item() == pytest.approx(case["grad_l2"], rel=1e-4)


def build(case):
    if "cov_type" in case:
        return so_vit_classifier(case["input_dim"], case["num_classes"], *case["dimension_reduction"])
    return sot_classifier(case["input_dim"], case["num_classes"], case["heads"], case["dim_per_head"])


@pytest.mark.parametrize("case", [PARTS["so_vit_head"][0], PARTS["sot_head"][0]], ids=["so_vit", "sot"])
def test_classifier__as_official(case):
    model, state = build(case), {}
    for key, shape, letter in case["state_dict"]:
        state[key] = draw(case["key_prefix"] + key, shape, letter, "B")
    model.load_state_dict(state)
    x = normal(np.random.RandomState(case["input"]["seed"]), *case["input"]["shape"])
    with torch.no_grad():
        np.testing.assert_allclose(model.eval()(x[:, 1:], x[:, 0]), case["eval"], rtol=1e-5, atol=1e-6)
    x.requires_grad_()
    out = model.train()(x[:, 1:], x[:, 0])
    np.testing.assert_allclose(out.detach(), case.get("train", case["eval"]), rtol=1e-5, atol=1e-6)
    out.logsumexp(-1).mean().backward()
    assert x.grad.norm().item() == pytest.approx(case["grad_l2_x"], rel=1e-4)
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert norms == pytest.approx(case["grad_l2_params"], rel=1e-4)
