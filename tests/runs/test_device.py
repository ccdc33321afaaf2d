"""Settings that are chosen by device."""

import importlib.util

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


@pytest.mark.parametrize(
    ("capability", "compile_mode", "attention", "tf32", "channels_last"),
    [
        ((9, 0), "default", "cudnn", True, True),
        ((8, 6), "default", "flash", True, True),
        ((7, 0), "default", "flash", False, True),
        ((6, 1), None, "flash", False, False),
    ],
)
def test_gpu__by_its_compute_capability(capability, compile_mode, attention, tf32, channels_last, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # Triton is installed
    config = OmegaConf.create(
        {
            "trainer": {"accelerator": "gpu", "precision": "bf16-mixed"},
            "compile": "auto",
            "optimizer": {"name": "lamb", "fused": "auto"},
            "kernels": {"attention": "auto", "tf32": "auto", "channels_last": "auto"},
        }
    )
    settle_auto(config)
    assert config.compile == compile_mode
    assert config.optimizer.fused is True
    assert config.kernels == {"attention": attention, "tf32": tf32, "channels_last": channels_last}
