"""Peak throughput of GPUs, and the operations of a training step: together, the share of the peak that a training uses.

Shapes: H x W pixels.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from vitrail.models.cost import measure_cost, training_operations
from vitrail.objectives.contract import passes_of
from vitrail.training.classifier import ImageClassifier


class Peak(NamedTuple):
    """Dense operations per second, in units of 10^12, by number format; None if there are no units for it."""

    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


PEAKS = {
    "gb200": Peak(2500, 2500, 1250, 80),
    "b200": Peak(2250, 2250, 1125, 75),
    "gh200": Peak(989.4, 989.4, 494.7, 66.9),
    "h200 nvl": Peak(835.5, 835.5, 417.5, 60),
    "h200": Peak(989.4, 989.4, 494.7, 66.9),
    "h100 nvl": Peak(835.5, 835.5, 417.5, 60),
    "h100 pcie": Peak(756, 756, 378, 51.2),
    "h100": Peak(989.4, 989.4, 494.7, 66.9),
    "a100": Peak(312, 312, 156, 19.5),
    "a40": Peak(149.7, 149.7, 74.8, 37.4),
    "a30": Peak(165, 165, 82, 10.3),
    "a10g": Peak(70, 70, 35, 31.2),
    "a10": Peak(125, 125, 62.5, 31.2),
    "rtx a6000": Peak(154.8, 154.8, 77.4, 38.7),
    "l40s": Peak(362, 362, 183, 91.6),
    "l40": Peak(181, 181, 90.5, 90.5),
    "l4": Peak(121, 121, 60, 30.3),
    "rtx 5090": Peak(209.5, 209.5, 104.8, 104.8),
    "rtx 4090": Peak(165.2, 165.2, 82.6, 82.6),
    "rtx 3090": Peak(71, 71, 35.6, 35.6),
    "v100-pcie": Peak(112, None, None, 14),
    "v100": Peak(125, None, None, 15.7),
    "t4": Peak(65, None, None, 8.1),
}
"""Peaks by a word of the device's name, from NVIDIA's data sheets: without sparsity, with float32 accumulation.

The first word that occurs in a name counts. (Lightning's table has the doubled figures of sparse products for some.)
"""


def peak_operations(device: torch.device, precision: str) -> float | None:
    """Return the operations per second that a device has in dense matrix products; None for CPUs and unknown devices.

    Args:
        device: device of the training.
        precision: `trainer.precision`; for `32-true`, PyTorch's current setting decides between TF32 and float32.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    peak = next((peak for word, peak in PEAKS.items() if re.search(rf"\b{re.escape(word)}(?![a-z0-9])", name)), None)
    if peak is None or precision.startswith(("64", "transformer-engine")):
        return None
    kind = "fp32" if torch.get_float32_matmul_precision() == "highest" or peak.tf32 is None else "tf32"
    if "16" in precision:
        kind = "bf16" if "bf16" in precision else "fp16"
    value = getattr(peak, kind)
    return None if value is None else 1e12 * value


def operations_per_image(module: ImageClassifier, sides: tuple[int, int]) -> int | None:
    """Return the operations of a training step for one image of (height, width) `sides`; None if they are unknown.

    They are those of the network in evaluation mode: recomputed activations do not count, and a network that drops
    tokens only in evaluation is underestimated.
    """
    teacher: Any = module.targets.teacher
    macs = macs_or_zero(module.model, sides)
    taught = 0 if teacher is None else macs_or_zero(teacher.model, teacher.image_size)
    if not macs or (teacher is not None and not taught):
        return None
    is_trained = any(parameter.requires_grad for parameter in module.model.parameters())
    return training_operations(macs, passes_of(module.objective) * (3 if is_trained else 1), taught)


def macs_or_zero(model: nn.Module, sides: tuple[int, int]) -> int:
    """Return the multiply-accumulates for one image of (height, width) `sides`; 0 if they cannot be counted."""
    try:
        return measure_cost(model, sides).macs
    except Exception:  # a network of the user may not support tensors on the meta device
        return 0
