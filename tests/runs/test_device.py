"""Settings that are chosen by device."""

import pytest
import torch
from omegaconf import OmegaConf

from vitrail.runs.device import settle_auto


@pytest.mark.parametrize(
    ("accelerator", "name", "fused", "expected"),
    [
        ("cpu", "adamw", "auto", True),
        ("cpu", "adam", "auto", True),
        ("cpu", "lamb", "auto", False),  # slower on a CPU
        ("cpu", "adamw", False, False),
        ("auto", "adamw", "auto", True),
        ("mps", "adamw", "auto", False),
    ],
)
def test_fused__where_the_cpu_has_a_kernel(accelerator, name, fused, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator == "mps")
    trainer = {"accelerator": accelerator, "precision": "32-true"}
    config = OmegaConf.create({"trainer": trainer, "optimizer": {"name": name, "fused": fused}})
    settle_auto(config)
    assert config.optimizer.fused is expected
