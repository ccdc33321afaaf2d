"""Peaks by the device's name, and the operations of a step counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from small_training import build, trainer
from vitrail.training import CosineSchedule, OptimizerFactory, SpeedMonitor, TargetBuilder, callbacks
from vitrail.training.peaks import macs_or_zero, operations_per_image, peak_operations

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "16-mixed", 756e12),
        ("NVIDIA H100 NVL", "bf16-true", 835.5e12),
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("NVIDIA A10G", "bf16-mixed", 70e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("Tesla V100-PCIE-16GB", "16-mixed", 112e12),
        ("Tesla T4", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-80GB", "64-true", None),
        ("NVIDIA RTX A4000", "bf16-mixed", None),  # not an A40
    ],
)
def test_peak__by_name_and_precision(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_operations(GPU, precision) == peak


def test_peak__of_float32_depends_on_tf32(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for name, peak in (("NVIDIA A100", 156e12), ("Tesla T4", 8.1e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_operations(GPU, "32-true") == peak
    assert peak_operations(torch.device("cpu"), "32-true") is None


def test_operations__of_student_and_teacher_by_hand():
    """A network of 8 x 8 x 3 x 10 = 1920 products: a backward pass counts as two forward passes."""
    module, _ = build()
    module.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert operations_per_image(module, (8, 8)) == 2 * 3 * 1920
    teacher = nn.Module()
    teacher.model, teacher.image_size = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (4, 4)
    module.targets = TargetBuilder(teacher=teacher)
    assert operations_per_image(module, (8, 8)) == 2 * (3 * 1920 + 240)
    module.model.requires_grad_(False)
    assert operations_per_image(module, (8, 8)) == 2 * (1920 + 240)


def test_operations__unknown_if_they_cannot_be_counted():
    class Odd(nn.Module):
        def forward(self, images):
            return images * float(images.sum())

    assert macs_or_zero(Odd(), (8, 8)) == 0
    module, _ = build()
    module.model = Odd()
    assert operations_per_image(module, (8, 8)) is None


@pytest.mark.parametrize("peak", [None, 1e9])
def test_share_of_peak__is_logged_where_the_peak_is_known(peak, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "peak_operations", lambda *_: peak)
    module, data = build(optimizer=OptimizerFactory(), schedule=CosineSchedule())
    fitting = trainer(tmp_path, [SpeedMonitor()], max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    fitting.fit(module, datamodule=data)
    metrics = SimpleNamespace(**{name.replace("/", "_"): float(v) for name, v in fitting.callback_metrics.items()})
    if peak is None:
        assert not hasattr(metrics, "speed_share_of_peak")
    else:
        reached = operations_per_image(module, (8, 8)) * metrics.speed_images_per_second
        assert metrics.speed_share_of_peak == pytest.approx(100 * reached / peak, rel=1e-4)
