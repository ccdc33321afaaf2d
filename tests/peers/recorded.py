"""Weights, inputs and comparisons for values recorded from the official implementations.

Weights: every entry of a state dict is drawn from NumPy's RandomState, seeded with the CRC-32 of its key, so they are
reproducible anywhere. With z standard normal, letter `n` means 0.02 z in recipe A and 0.05 z in recipe B (0.7 z for the
performer's random features), `w` 1 + 0.1 z, `v` 1 + 0.1 |z|, `z` zero. Position tables and running statistics follow
the recipe too. Matrices of score predictors and of Evo-ViT's `qk` have a standard deviation of 1.5 / sqrt(columns), and
Evo-LeViT's `c` of 2.2 (convolutions), 0.6 (A) or 0.63 (B) over the root of their inputs, so that scores differ. A
prefix of the key changes the seed. Attention is nearly uniform with A, but not with B. Inputs are
RandomState(1234).standard_normal.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

FOLDER = Path(__file__).parent


def recorded(name):
    """Return the contents of the JSON file `name` in this folder."""
    return json.loads((FOLDER / name).read_text())


def cases_of(records):
    """Return (name, recipe) for each set of weights of each record, with the suites that skip it as marks."""
    cases = []
    for name, record in records.items():
        for recipe in [recipe for recipe in ("A", "B") if recipe in record]:
            mark = pytest.mark.slow if "_s" in name or recipe == "A" else pytest.mark.thorough
            cases.append(pytest.param(name, recipe, marks=[] if "toy" in name else mark))
    return cases


def draw(key, shape, fill, recipe, prefix=""):
    """Return one tensor of the weights."""
    z = np.asarray(np.random.RandomState(zlib.crc32((prefix + key).encode())).standard_normal(shape), dtype=np.float32)
    scale = 0.02 if recipe == "A" else 0.7 if key.endswith(("attention1.w", "attention2.w")) or key == "w" else 0.05
    if key.endswith(".qk.weight") or ("score_predictor" in key and len(shape) == 2):
        scale = np.float32(1.5 / np.sqrt(shape[1]))
    if key.endswith(".c.weight"):
        scale = np.float32((2.2 if len(shape) == 4 else 0.6 if recipe == "A" else 0.63) / np.sqrt(np.prod(shape[1:])))
    value = {"n": scale * z, "w": 1 + 0.1 * z, "v": 1 + 0.1 * np.abs(z), "z": 0 * z}[fill]
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@torch.no_grad()
def fill(model, letters, recipe, official=lambda key: key, prefix=""):
    """Fill `model` with the recipe's weights; `official` maps its keys to the recorded ones."""
    for (key, tensor), letter in zip(model.state_dict().items(), letters, strict=True):
        tensor.copy_(draw(official(key), tensor.shape, letter, recipe, prefix))


def images(side, batch=2, seed=1234):
    """Return the recorded input (B, 3, side, side)."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, 3, side, side)).astype(np.float32))


def soft_targets(batch, classes, seed):
    """Return recorded class probabilities (B, C): smoothed labels, mixed with those of the reversed batch."""
    labels, off = np.random.RandomState(seed).randint(0, classes, size=batch), 0.1 / classes
    target = np.full((batch, classes), off)
    target[np.arange(batch), labels] = 0.9 + off
    return torch.from_numpy((0.7 * target + 0.3 * target[::-1]).astype(np.float32))


class SoftCrossEntropy(torch.nn.Module):
    """Cross-entropy of the class logits (B, C) with probabilities (B, C)."""

    needs = frozenset()

    def forward(self, outputs, targets):
        return {"loss": -(targets.cls * outputs.cls.log_softmax(-1)).sum(-1).mean()}


def as_strings(mask):
    """Return a mask (B, N) as one string of 0 and 1 for each image."""
    return ["".join("1" if value > 0.5 else "0" for value in row) for row in mask.tolist()]


def assert_norms(model, expected, rtol=1e-4):
    """Check the norms of all gradients, in the order of the state dict."""
    parameters, largest = dict(model.named_parameters()), max(norm for norm in expected if norm)
    for key, norm in zip(model.state_dict(), expected, strict=True):
        if key in parameters:
            gradient = parameters[key].grad
            found = 0.0 if gradient is None else gradient.double().norm().item()
            assert abs(found - (norm or 0)) <= rtol * (norm or 0) + 1e-6 * largest, key


def assert_tensor(actual, expected, rtol=1e-4):
    """Check values to rtol plus 2e-5 standard deviations, and mean, standard deviation and norm to rtol."""
    a = actual.detach().double().numpy()
    assert list(a.shape) == expected["shape"]
    std = expected["std"]
    views = {
        "first8": lambda: a[:, :8],
        "every125": lambda: a[:, ::125][:, :8],
        "first8_token0": lambda: a[:, 0, :8],
        "first8_tokenlast": lambda: a[:, -1, :8],
    }
    checked = 0
    for name, view in views.items():
        if name in expected:
            np.testing.assert_allclose(view(), expected[name], rtol=rtol, atol=2e-5 * std, err_msg=name)
            checked += 1
    assert checked
    assert abs(a.mean() - expected["mean"]) <= rtol * std
    assert abs(a.std() - expected["std"]) <= rtol * std
    assert abs(np.sqrt((a * a).sum()) - expected["l2"]) <= rtol * max(expected["l2"], std * np.sqrt(a.size))


def check_initial_weights(name, statistics):
    """Compare mean, spread and largest values of each new weight with those of the official code."""
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    for key, mean, std, low, high in statistics[name]:
        values = state[key].double()
        n = values.numel()
        assert values.std(correction=0).item() == pytest.approx(std, rel=0.05 + 4 / n**0.5, abs=1e-9), key
        assert values.mean().item() == pytest.approx(mean, abs=8 * std / n**0.5 + 1e-9), key
        assert values.abs().max().item() <= 1.5 * max(abs(low), abs(high)) + 1e-9, key
