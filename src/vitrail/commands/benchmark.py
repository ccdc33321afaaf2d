"""Measure speed and memory of a backbone, alone or against another one, on one device."""

import csv
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig
from rich import get_console
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models import forward_heads
from vitrail.models.cost import count_parameters
from vitrail.reporting.backbones import speed_table
from vitrail.runs.assembly import build_model, model_name
from vitrail.runs.keys import check_choices, check_keys
from vitrail.training.memory import extra_memory
from vitrail.training.peaks import macs_or_zero
from vitrail.types import height_width

_CHOICES = {"mode": ("train", "infer"), "precision": ("fp32", "bf16", "fp16"), "device": ("auto", "cpu", "cuda")}
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Side(NamedTuple):
    """One of the two compared backbones; `heads` returns its outputs for images (B, 3, H, W)."""

    name: str
    model: nn.Module
    heads: Callable[[Tensor], list[Tensor]]


def benchmark(config: DictConfig) -> list[dict[str, Any]]:
    """Measure `config.model` and `config.against`, print the table, and append the rows to `config.csv`.

    Returns:
        One row per side: milliseconds per step (median), images per second, peak memory in MB, MACs, and the share of
        the device's throughput in large matrix products at this precision.

    Raises:
        ConfigError: a setting is invalid, or `against` cannot be built.
    """
    check_keys(config, "benchmark")
    check_choices(config, _CHOICES)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch sees no GPU here; use device=cpu.")
    name = model_name(config.model)
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    sides = height_width(config.image_size or (cfg.input_size[1:] if cfg else (224, 224)))
    images = torch.randn(config.batch_size, 3, *sides, device=device)
    contestants = [_ours(config, sides, device)]
    if config.against is not None:
        contestants.append(_theirs(config.against, config.num_classes, sides, device))
    steps = [_step(side, images, config) for side in contestants]
    peak = _matmul_peak(device, _DTYPES[config.precision])
    seconds = _time_interleaved(steps, config.rounds, config.steps, device)
    rows = []
    for side, step, times in zip(contestants, steps, seconds, strict=True):
        macs = macs_or_zero(side.model, sides)
        work = 2 * macs * config.batch_size * (3 if config.mode == "train" else 1)
        median = statistics.median(times)
        rows.append(
            {
                "model": side.name,
                "mode": config.mode,
                "precision": config.precision,
                "compile": config.compile if side is contestants[0] else None,
                "batch_size": config.batch_size,
                "image": "x".join(map(str, sides)),
                "ms": round(1e3 * median, 4),
                "ms_min": round(1e3 * min(times), 4),
                "ms_max": round(1e3 * max(times), 4),
                "images_per_second": round(config.batch_size / median, 2),
                "peak_mb": round(_peak_memory(step, side.model, device) / 2**20, 3),
                "parameters": count_parameters(side.model),
                "gmacs": round(macs / 1e9, 6),
                "share_of_peak": round(work / median / peak, 4),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    ratios = [ours / theirs for ours, theirs in zip(*seconds, strict=True)] if len(seconds) == 2 else []
    get_console().print(speed_table(rows, peak, ratios))
    if config.csv is not None:
        _append(Path(config.csv), rows)
    return rows


def _ours(config: DictConfig, sides: tuple[int, int], device: torch.device) -> Side:
    model = build_model(config.model, config.num_classes, sides).to(device)
    read = torch.compile(forward_heads, mode=config.compile) if config.compile else forward_heads
    return Side(model_name(config.model), model, lambda images: _tensors(read(model, images)[:3]))


def _theirs(against: str, num_classes: int, sides: tuple[int, int], device: torch.device) -> Side:
    if ".py:" not in against:
        if not timm.is_model(against):
            raise ConfigError(f"against={against}: neither a backbone in timm nor file.py:function.")
        model = timm.create_model(against, num_classes=num_classes, img_size=sides).to(device)
        return Side(against, model, lambda images: _tensors(forward_heads(model, images)[:3]))
    path, _, function = against.partition(".py:")
    file = Path(f"{path}.py")
    if not file.is_file():
        raise ConfigError(f"against={against}: no such file {file}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"against={against}: {file} has no function {function}.")
    built = getattr(module, function)().to(device)
    return Side(f"{file.stem}:{function}", built, lambda images: _tensors(built(images)))


def _tensors(outputs: Any) -> list[Tensor]:
    """Return all floating-point tensors in nested tuples or lists."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    return [tensor for output in outputs for tensor in _tensors(output)] if isinstance(outputs, tuple | list) else []


def _step(side: Side, images: Tensor, config: DictConfig) -> Callable[[], None]:
    dtype = _DTYPES[config.precision]
    side.model.train(config.mode == "train")

    def autocast() -> Any:
        return torch.autocast(images.device.type, dtype) if dtype else nullcontext()

    def train() -> None:
        with autocast():
            heads = side.heads(images)
        torch.stack([head.float().logsumexp(-1).mean() for head in heads]).sum().backward()
        side.model.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def infer() -> None:
        with autocast():
            side.heads(images)

    return train if config.mode == "train" else infer


def _time_interleaved(
    steps: list[Callable[[], None]], rounds: int, count: int, device: torch.device
) -> list[list[float]]:
    """Return the seconds per step, `rounds` times for each side, interleaved, so that drift affects both alike."""
    seconds: list[list[float]] = [[] for _ in steps]
    for round_ in range(-2, rounds):  # the first two rounds warm up
        for step, times in zip(steps, seconds, strict=True):
            _synchronise(device)
            started = time.perf_counter()
            for _ in range(count):
                step()
            _synchronise(device)
            if round_ >= 0:
                times.append((time.perf_counter() - started) / count)
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_peak(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the operations per second that this device reaches in a large matrix product, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _synchronise(device)
        started = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _peak_memory(step: Callable[[], None], model: nn.Module, device: torch.device) -> float:
    """Return the peak memory of a step in bytes, including weights, as counted by PyTorch's allocators."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    return extra_memory(step) + sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
