"""Compare distillation losses with values recorded from DeiT's code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peers.recorded import recorded
from vitrail.objectives import BinaryCrossEntropy, CrossEntropy, DistillationLoss
from vitrail.types import Outputs, Targets

BASES = {
    "ce": CrossEntropy(),
    "label_smoothing_0.1": CrossEntropy(0.1),
    "soft_target": CrossEntropy(0.1),
    "bce": BinaryCrossEntropy(),
}


def inputs(case):
    """Return logits of both tokens and the teacher (B, C), and labels, drawn in this order from the case's seed."""
    shape = (case["B"], case["C"])
    random = np.random.RandomState(case["seed"])
    logits = [torch.from_numpy((random.standard_normal(shape) * scale).astype(np.float32)) for scale in (2, 2, 3)]
    labels = torch.from_numpy(random.randint(0, case["C"], size=case["B"]))
    if case["base"] == "soft_target":
        one_hot = F.one_hot(labels, case["C"]).float()
        labels = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    return (*logits, labels)


@pytest.mark.parametrize("case", recorded("distillation_loss.json"))
def test_loss_and_gradients__as_official(case):
    cls, distill, teacher, labels = inputs(case)
    cls.requires_grad_(), distill.requires_grad_()
    objective = DistillationLoss(case["type"], case["alpha"], case["tau"], base=BASES[case["base"]])
    losses = objective(Outputs(cls, distill=distill), Targets(labels, teacher_logits=teacher))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(case["loss"], rel=2e-5)
    assert cls.grad.double().norm().item() == pytest.approx(case["grad_l2_outputs"], rel=1e-4)
    assert distill.grad.double().norm().item() == pytest.approx(case["grad_l2_outputs_kd"], rel=1e-4)
