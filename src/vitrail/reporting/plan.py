"""Table with the plan of a training."""

import csv
import importlib.resources
import math
from typing import Any, NamedTuple

from rich.console import Group
from rich.text import Text

from vitrail.data import Augmentation
from vitrail.models.cost import Cost
from vitrail_runtime.tables import PlainTable

PEAK, UTILISATION = 312e12, 0.3
"""Assumptions for the hours: an A100's bf16 operations per second, and the share that a training reaches."""


def loader_speed(storage: str, render: str) -> int:
    """Return the images per second of one loader core, as `benchmarks/data_path.py` measured them.

    Args:
        storage: `files`, or how a pack stores them: `packed`, `packed_256`, `packed_raw`, `packed_raw_original`.
        render: where images are rendered, `loader` or `device`.
    """
    text = importlib.resources.files("vitrail.reporting").joinpath("loader_speed.csv").read_text(encoding="utf-8")
    rows = {(row["data"], row["render"]): row for row in csv.DictReader(text.splitlines())}
    return int(rows[storage, render]["images_per_second"])


_STORAGES = {
    "files": "image files",
    "packed": "packed files",
    "packed_256": "packed JPEGs of 256 pixels",
    "packed_raw": "packed pixels of 256 pixels",
    "packed_raw_original": "packed pixels",
}
_PLACES = {"loader": "in the loader", "device": "on the device"}


class PhaseCost(NamedTuple):
    """Estimates for the epochs of one image size."""

    image_size: tuple[int, int]  # height and width in pixels
    magnitudes: tuple[int, int] | None  # lowest and highest magnitude of RandAugment; None for the augmentation's own
    epochs: int
    macs: int  # multiply-accumulates per image
    images: int | None  # images that are decoded
    images_per_second: float | None  # over all devices; None for CPUs
    hours: float | None  # of GPU time


class Plan(NamedTuple):
    """Estimates for a training before it starts."""

    name: str
    missing: list[str]  # keys that have to be set
    image_size: tuple[int, int]  # height and width in pixels
    classes: int
    images: int | None  # training images; None if unknown
    cost: Cost
    teacher: Cost | None
    teacher_name: str
    devices: int
    batch_per_device: int
    accumulated: int  # batches per optimiser step
    batch: int  # images per optimiser step
    steps: int | None  # optimiser steps per epoch
    epochs: int
    rates: list[float]  # learning rate of each epoch
    groups: dict[float, int]  # weight decay -> number of parameters with it
    activations: float  # bytes per image
    memory: float  # bytes per device
    images_per_second: float | None  # over all devices; None for CPUs
    hours: float | None
    disk: float  # bytes
    augmentation: list[str]  # one description per step
    optimizer: str  # description
    phases: list[PhaseCost]  # one for each image size in turn; empty for a training at one size
    equal_epochs: float  # epochs at the final size that cost as much, counted in pixels
    by: str  # what the phases share: epochs or compute
    stored: str = ""  # how the stored pixels differ from the original files
    storage: str | None = "files"  # files, packed, packed_256, ...; None if the loader's speed is not known
    render: str = "loader"  # where training images are rendered: loader or device
    bytes_per_image: float | None = None  # from loader to device, for images of 500 x 375 pixels; None if not known

    @property
    def operations(self) -> float:
        """Operations of the backbone, relative to those of the same epochs at the final size."""
        if not self.phases:
            return 1.0
        return sum(phase.epochs * phase.macs for phase in self.phases) / (self.epochs * self.cost.macs)


def plan_table(plan: Plan) -> Group:
    """Return the plan as a table, followed by the keys that still have to be set."""
    table = PlainTable(title=f"Plan of {plan.name}", show_header=False, title_style="bold")
    sides = " x ".join(map(str, plan.image_size))
    tokens = "" if plan.cost.tokens is None else f", {plan.cost.tokens} tokens"
    table.add_row("model", f"{plan.cost.parameters / 1e6:.1f} M parameters, {plan.cost.macs / 1e9:.2f} G MACs{tokens}")
    table.add_row("images", f"{_number(plan.images)} of {plan.classes} classes, {sides} pixels")
    if plan.stored:
        table.add_row("", plan.stored)
    parts = [plan.batch_per_device, f"{plan.devices} devices", f"{plan.accumulated} accumulated"]
    table.add_row("batch", f"{' x '.join(map(str, parts))} = {plan.batch}")
    table.add_row("augmentation", "\n".join(plan.augmentation))
    table.add_row("optimizer", plan.optimizer)
    for decay, count in sorted(plan.groups.items(), reverse=True):
        table.add_row("", f"weight decay {decay:g} on {count / 1e6:.2f} M parameters")
    table.add_row("learning rate", f"{curve(plan.rates)}\n{min(plan.rates):.2g} to {max(plan.rates):.3g}")
    total = "" if plan.steps is None else f" = {plan.steps * plan.epochs:,}"
    table.add_row("steps", f"{_number(plan.steps)} x {plan.epochs} epochs{total}")
    if plan.phases:
        table.add_row("phases", "\n".join(_phase_lines(plan)))
    gib = 2**30
    activations = f"{plan.activations / 2**20:,.0f} MiB of activations per image"
    table.add_row("memory", f"about {plan.memory / gib:.1f} GiB per device, eager, {activations}")
    if plan.images_per_second is None:
        table.add_row("time", "not estimated for CPUs; add trainer=gpu or trainer=ddp_8gpu")
    else:
        speeds = [plan.images_per_second, *(phase.images_per_second or 0 for phase in plan.phases)]
        needed = f"{'up to ' if plan.phases else ''}{max(speeds):,.0f} images/s needed"
        if plan.storage is None:
            table.add_row("loader", needed)
        else:
            per_core = loader_speed(plan.storage, plan.render)
            cores = math.ceil(max(speeds) / per_core)
            where = f"{_STORAGES[plan.storage]}, rendered {_PLACES[plan.render]}"
            table.add_row("loader", f"{needed}: about {cores:,} cores, {per_core:,} images/s each\n({where})")
        if plan.bytes_per_image is not None:
            rate = max(speeds) * plan.bytes_per_image / plan.devices / 1e9
            table.add_row(
                "", f"{plan.bytes_per_image / 1e3:,.0f} kB per image to the device, {rate:.1f} GB/s per device"
            )
        hours = "?" if plan.hours is None else f"{plan.hours:.1f}"
        gpu_hours = "?" if plan.hours is None else f"{plan.hours * plan.devices:,.0f}"
        assumption = f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (A100, bf16) per device"
        table.add_row("time", f"{hours} h, {gpu_hours} GPU-hours, at {assumption}")
    table.add_row("disk", f"{plan.disk / gib:.1f} GiB for best.ckpt and last.ckpt")
    if plan.teacher is not None:
        size_of = f"{plan.teacher.parameters / 1e6:.1f} M parameters, {plan.teacher.macs / 1e9:.2f} G MACs"
        table.add_row("teacher", f"{plan.teacher_name}: {size_of}, included above")
    lines = [Text(f"still needed: {key}=...", no_wrap=True, style="bold") for key in plan.missing]
    return Group(table, *lines)


def _phase_lines(plan: Plan) -> list[str]:
    """Return a line for each image size, the operations of the whole training, and a warning about decoding."""
    lines = []
    for phase in plan.phases:
        height, width = phase.image_size
        low, high = phase.magnitudes or (0, 0)
        magnitude = f", magnitude {low}" + (f" to {high}" if high > low else "") if phase.magnitudes else ""
        decoded = "? images" if phase.images is None else f"{phase.images / 1e6:,.1f} M images"
        time = "" if phase.hours is None else f", {phase.hours:.1f} h of GPU time"
        speed = "" if phase.images_per_second is None else f" at {phase.images_per_second:,.0f} images/s"
        lines.append(f"{height} x {width} px{magnitude}: {phase.epochs} epochs, {decoded} decoded{time}{speed}")
    side = " x ".join(map(str, plan.image_size))
    lines.append(f"{plan.operations:.2f} of the operations of {plan.epochs} epochs at {side} px")
    if plan.by == "compute" and plan.epochs > round(plan.equal_epochs):
        lines.append(
            f"decodes {plan.epochs / plan.equal_epochs:.1f} times the images of {plan.equal_epochs:.0f} epochs at"
            f" {side} px, which take as much GPU time: slower than these if the loader is the limit"
        )
    return lines


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def curve(values: list[float], width: int = 60) -> str:
    """Draw values as a line of block characters; the highest value is a full block."""
    blocks = " ▁▂▃▄▅▆▇█"
    columns = min(width, len(values))
    chosen = [values[column * len(values) // columns] for column in range(columns)]
    return "".join(blocks[math.ceil(8 * value / max(values))] if value > 0 else " " for value in chosen)


def describe_augmentation(augment: Augmentation, hflip: float, mixing: Any) -> list[str]:
    """Describe the augmentation of a training image, one step per line."""
    if not augment.enabled:
        return ["as in evaluation"]
    low, high = (f"{100 * share:g}" for share in augment.scale)
    words = [f"a crop of {low} to {high} % of the area, {augment.interpolation}"]
    if augment.shift is not None:
        words = [f"the whole image, moved by up to {100 * augment.shift:g} % of its side"]
    flip = hflip if augment.hflip is None else augment.hflip
    if flip:
        words.append(f"mirrored with probability {flip:g}")
    if augment.auto_augment:
        words.append("3-Augment" if augment.auto_augment == "3a" else f"RandAugment {augment.auto_augment}")
    if augment.color_jitter:
        words.append(f"colours changed by up to {augment.color_jitter:g}")
    if augment.erase_prob:
        words.append(f"a box erased with probability {augment.erase_prob:g}")
    if mixing is not None:
        words.append(mixing.describe())
    words.append(f"evaluation: the central {100 * augment.crop_pct:g} % of the side")
    return words
