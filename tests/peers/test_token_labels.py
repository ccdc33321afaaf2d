"""Compare token targets and their loss with the official token-labelling code."""

import numpy as np
import pytest
import torch

from peers.recorded import FOLDER, recorded
from vitrail.data.label_maps import sparse_token_targets, token_targets
from vitrail.data.mixing import TokenMix
from vitrail.objectives import TokenLabelingLoss
from vitrail.training.targets import blend_ground_truth
from vitrail.types import Outputs, Targets

CASES = sorted(path.name for path in (FOLDER / "token_label").glob("*.npz"))
LOSSES = recorded("token_label_loss.json")["loss"]


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("form", [token_targets, sparse_token_targets])
@pytest.mark.parametrize("case", CASES)
def test_token_targets__as_official(case, form, transpose):
    """Recorded columns: the true label, the class token, then the patch tokens, mixed with the reversed batch."""
    data = np.load(FOLDER / "token_label" / case)
    top, left, height, width = torch.from_numpy(data["coords"]).float().unbind(1)
    boxes = torch.stack((left, top, left + width, top + height), 1)
    flipped = torch.full((4,), bool(data["flip"]))
    scores, classes = torch.from_numpy(data["scores"]), torch.from_numpy(data["index"].astype(np.int64))
    size, c = int(data["label_size"]), int(data["num_classes"])
    targets = form(scores, classes, boxes, flipped, (size, size), c, float(data["smoothing"]), transpose)
    tokens = targets.tokens.to_dense() if form is sparse_token_targets else targets.tokens
    ours = torch.cat((targets.cls[:, None], tokens), 1) if size > 1 else targets.cls[:, None]
    lam = float(data["lam"])
    ours = (ours * lam + ours.flip(0) * (1 - lam)).transpose(1, 2).numpy()  # (B, C, 1 + N)
    name = "target" if transpose else "target_xy"
    if name in data:
        np.testing.assert_allclose(ours, data[name][:, :, 1:], rtol=0, atol=1e-4)
    else:
        chosen = data["classes"].astype(int)
        np.testing.assert_allclose(ours[:, chosen], data[f"{name}_slice"][:, :, 1:], rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.sum(1), data[f"{name}_sum"][:, 1:], rtol=0, atol=1e-4)


def loss_inputs(case):
    """Return logits and targets of a recorded loss, drawn from its seed in this order, as in its description."""
    b, n, c = case["B"], case["N"], case["C"]

    def softmax(values, axis):
        e = np.exp(values - values.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    random = np.random.RandomState(case["seed"])
    cls = (random.standard_normal((b, c)) * 2).astype(np.float32)
    tokens = (random.standard_normal((b, n, c)) * 2).astype(np.float32)
    targets, truth = np.zeros((b, c, 2 + n), np.float32), random.randint(0, c, size=b)
    targets[:, :, 0] = 0.1 / c
    targets[np.arange(b), truth, 0] = np.float32(1 - 0.1 + 0.1 / c)
    targets[:, :, 1:] = softmax(random.standard_normal((b, c, 1 + n)) * 3, 1)
    for i in range(0, b, 2):
        targets[i, :, 1] = softmax((np.arange(c) == truth[i])[None] * 8.0 + random.standard_normal((1, c)), 1)[0]
    return torch.from_numpy(cls).requires_grad_(), torch.from_numpy(tokens).requires_grad_(), torch.from_numpy(targets)


@pytest.mark.parametrize("case", [case for case in LOSSES if case["kind"] != "soft2"])
def test_loss__as_official(case):
    check_loss(case)


def check_loss(case):
    """Compare loss and gradients with a recorded case."""
    cls, tokens, recorded_targets = loss_inputs(case)
    x1, y1, x2, y2 = case["bbox"]
    area = (x2 - x1) * (y2 - y1)
    share = 1 - area / case["N"] if area else None
    truth, label = recorded_targets[:, :, 0], recorded_targets[:, :, 1]
    dense = recorded_targets[:, :, 2:].transpose(1, 2) if case["kind"] == "token" else None
    objective = TokenLabelingLoss(case["dense_weight"], case["cls_weight"])
    target = blend_ground_truth(label, truth, "published" if case["ground_truth"] else "none")
    if dense is None:  # every token learns its own image's label, with which nothing is blended
        dense, target = label[:, None], label
    if share is not None:
        target = TokenMix(torch.zeros(4), share).probabilities(target)
    losses = objective(Outputs(cls, tokens), Targets(target, dense))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(case["loss"], rel=2e-5)
    for gradient, name in ((cls.grad, "grad_l2_x_cls"), (tokens.grad, "grad_l2_x_aux")):
        assert gradient.double().norm().item() == pytest.approx(case[name], rel=1e-4)
