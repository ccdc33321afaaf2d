"""`plan=true`: what a training would do and take, told without data, GPU or time."""

import math
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, UntypedStorage, nn

from vitrail.data import Augmentation, MixToken
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.cost import Cost, measure_cost
from vitrail.run.config import instantiate
from vitrail.training import CosineSchedule, OptimizerFactory

PEAK, UTILISATION = 312e12, 0.3
"""What hours are computed for: an A100's bf16 operations a second, and the share of them that a training reaches."""

CORE = 160
"""Images of ImageNet's size that one core decodes and augments in a second, about."""

_TORCHVISION = {"FashionMNIST": 60_000, "CIFAR10": 50_000, "CIFAR100": 50_000}
_NEEDED = ("data.root", "data.label_maps", "ckpt")


class Plan(NamedTuple):
    """What is known of a training before it starts."""

    missing: list[str]  # keys that have to be set
    classes: int
    images: int | None  # of training; None where nobody can know yet
    cost: Cost
    teacher: Cost | None
    devices: int
    batch: int  # images per optimiser step
    steps: int | None  # optimiser steps of an epoch
    epochs: int
    rates: list[float]  # learning rate of each epoch
    groups: dict[float, int]  # weight decay -> number of parameters that have it
    activations: float  # bytes per image
    memory: float  # bytes per device
    images_per_second: float  # of all devices
    hours: float | None
    disk: float  # bytes
    augmentation: list[str]


def make_plan(config: DictConfig) -> Plan:
    """Compute the plan of a training; of the data only the number of images and classes is looked at, if it is there.

    Raises:
        ConfigError: a setting cannot work.
    """
    config = config.copy()
    missing = _take_missing(config)
    images, classes = _data_size(config, missing)
    size = config.data.image_size
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    model = instantiate(config.model, "model", num_classes=config.model.num_classes or classes, img_size=sides)
    if config.checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    optimizer: OptimizerFactory = instantiate(config.optimizer, "optimizer")
    schedule: CosineSchedule = instantiate(config.schedule, "schedule")
    augment: Augmentation = instantiate(config.augment, "augment")
    trainer = config.trainer
    devices = (trainer.devices if isinstance(trainer.devices, int) else 1) * trainer.num_nodes
    per_step = config.data.batch_size * devices
    batch = per_step * trainer.accumulate_grad_batches
    steps = None if images is None else math.ceil((images // per_step) / trainer.accumulate_grad_batches)
    groups: dict[float, int] = {}
    for group in optimizer.build(model, batch).param_groups:
        amount = float(group["weight_decay"])
        groups[amount] = groups.get(amount, 0) + sum(parameter.numel() for parameter in group["params"])
    cost, teacher = measure_cost(model, sides), _teacher_cost(config)
    passes = getattr(instantiate(config.objective, "objective"), "submodels", 1)  # of each image in a step
    saved = passes * activation_bytes(model, sides) * (0.5 if "16" in str(trainer.precision) else 1.0)
    states = 4 if optimizer.name in ("sgd", "momentum", "lion") else 8
    averaged = 0 if config.callbacks.get("ema") is None else 4
    # Two operations a multiply-accumulate; the backward pass is twice the forward pass, and a teacher has none.
    work = 6 * cost.macs * passes + (2 * teacher.macs if teacher else 0)
    speed = devices * PEAK * UTILISATION / work
    sharing = devices if str(config.strategy.get("_target_", "")).endswith(".FSDP") else 1  # but for a gathered block
    held = cost.parameters * (8 + states + averaged) / sharing + (4 * teacher.parameters if teacher else 0)
    epochs = int(trainer.max_epochs)
    return Plan(
        missing=missing,
        classes=classes,
        images=images,
        cost=cost,
        teacher=teacher,
        devices=devices,
        batch=batch,
        steps=steps,
        epochs=epochs,
        rates=_rates(schedule, optimizer.scaled_lr(batch), epochs),
        groups=groups,
        activations=saved,
        memory=held + saved * config.data.batch_size,
        images_per_second=speed,
        hours=None if steps is None else steps * batch * epochs / speed / 3600,
        disk=2 * cost.parameters * (4 + states + averaged),
        augmentation=describe_augmentation(augment, config.data.hflip),
    )


def _teacher_cost(config: DictConfig) -> Cost | None:
    """What the teacher costs for one image, at its own size; its weights are not looked for."""
    if config.teacher is None:
        return None
    if "name" not in config.teacher:
        teacher = instantiate(config.teacher, "teacher")
        return measure_cost(teacher.model, teacher.image_size)
    published = timm.get_pretrained_cfg(config.teacher.name)
    if published is None:
        raise ConfigError(f"teacher.name={config.teacher.name}: no such backbone; timm.list_models() shows all.")
    size = config.teacher.image_size or published.input_size[1:]
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    try:
        with torch.device("meta"):  # no memory, no time
            model = create_model(config.teacher.name, published.num_classes, sides)
    except NotImplementedError:  # older versions of timm compute with tensors while they build RegNets
        model = create_model(config.teacher.name, published.num_classes, sides)
    return measure_cost(model, sides)


def _take_missing(config: DictConfig) -> list[str]:
    """The keys that this training needs and has not; they become null."""
    missing = []
    for key in _NEEDED:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group) if group else config
        value = OmegaConf.to_container(node, resolve=False)[name] if name in node else None  # type: ignore[index,call-overload]
        if isinstance(value, str) and value.startswith("${needed:"):
            missing.append(key)
            OmegaConf.update(config, key, None)
    return missing


def _data_size(config: DictConfig, missing: list[str]) -> tuple[int | None, int]:
    """Number of training images and of classes."""
    target = str(config.data._target_).rpartition(".")[2]
    if target == "TorchvisionDataModule":
        return _TORCHVISION.get(config.data.name), len(config.data.classes)
    if target.startswith("Image") and config.data.root is None:
        missing.insert(0, "data.root")
        return (1_281_167, 1000) if target == "ImageNetDataModule" else (None, config.model.num_classes or 1000)
    data = instantiate(config.data, "data", augment=Augmentation())
    return len(data.source.open("train")), data.num_classes


def _rates(schedule: CosineSchedule, peak: float, epochs: int) -> list[float]:
    """The learning rate at the middle of each epoch, or all through it where it changes once an epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = schedule.build(optimizer, epochs, steps_per_epoch=100)
    rates = []
    for epoch in range(epochs):
        schedule.advance(scheduler, epoch, 100 * epoch + 50)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def activation_bytes(model: nn.Module, sides: tuple[int, int]) -> int:
    """Bytes that a training step of one image in float32 keeps for the backward pass, measured in a forward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, UntypedStorage] = {}  # held, so that no two have the same address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_heads(model, torch.zeros(2, 3, *sides))
    return sum(storage.nbytes() for storage in kept.values()) // 2


def describe_augmentation(augment: Augmentation, hflip: float) -> list[str]:
    """What becomes of a training image, in words, a step a line."""
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
    if isinstance(augment.mix, MixToken):
        words.append("MixToken")
    elif augment.mix is not None:
        options: dict[str, Any] = augment.mix.options
        parts = [f"{name} {options[f'{name}_alpha']:g}" for name in ("mixup", "cutmix") if options[f"{name}_alpha"]]
        words.append(" or ".join(parts))
    words.append(f"evaluation: the central {100 * augment.crop_pct:g} % of the side")
    return words


def plan_table(plan: Plan, config: DictConfig, describe: str) -> Group:
    """The plan as a table, and what is missing as a command would name it.

    Args:
        plan: what was computed.
        config: of the training.
        describe: the optimiser in words.
    """
    table = Table(title=f"Plan of {config.model.name}", show_header=False, title_style="bold")
    size = config.data.image_size
    sides = f"{size} x {size}" if isinstance(size, int) else " x ".join(map(str, size))
    tokens = "" if plan.cost.tokens is None else f", {plan.cost.tokens} tokens"
    table.add_row("model", f"{plan.cost.parameters / 1e6:.1f} M parameters, {plan.cost.macs / 1e9:.2f} G MACs{tokens}")
    table.add_row("images", f"{_number(plan.images)} of {plan.classes} classes, {sides} pixels")
    parts = [config.data.batch_size, f"{plan.devices} devices", f"{config.trainer.accumulate_grad_batches} accumulated"]
    table.add_row("batch", f"{' x '.join(map(str, parts))} = {plan.batch}")
    table.add_row("augmentation", "\n".join(plan.augmentation))
    table.add_row("optimizer", describe)
    for decay, count in sorted(plan.groups.items(), reverse=True):
        table.add_row("", f"weight decay {decay:g} on {count / 1e6:.2f} M parameters")
    table.add_row("learning rate", f"{curve(plan.rates)}\n{min(plan.rates):.2g} to {max(plan.rates):.3g}")
    total = "" if plan.steps is None else f" = {plan.steps * plan.epochs:,}"
    table.add_row("steps", f"{_number(plan.steps)} x {plan.epochs} epochs{total}")
    gib = 2**30
    activations = f"{plan.activations / 2**20:,.0f} MiB of activations an image"
    table.add_row("memory", f"about {plan.memory / gib:.1f} GiB a device, eager, {activations}")
    cores = math.ceil(plan.images_per_second / CORE)
    table.add_row(
        "loader", f"{plan.images_per_second:,.0f} images/s wanted: about {cores:,} cores, {CORE} images/s each"
    )
    hours = "?" if plan.hours is None else f"{plan.hours:.1f}"
    gpu_hours = "?" if plan.hours is None else f"{plan.hours * plan.devices:,.0f}"
    yardstick = f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (A100, bf16) a device"
    table.add_row("time", f"{hours} h, {gpu_hours} GPU-hours, at {yardstick}")
    table.add_row("disk", f"{plan.disk / gib:.1f} GiB for best.ckpt and last.ckpt")
    if plan.teacher is not None:
        size_of = f"{plan.teacher.parameters / 1e6:.1f} M parameters, {plan.teacher.macs / 1e9:.2f} G MACs"
        table.add_row("teacher", f"{config.teacher.get('name', 'a run')}: {size_of}, counted above")
    lines = [Text(f"still needed: {key}=...", no_wrap=True, style="bold") for key in plan.missing]
    return Group(table, *lines)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def curve(values: list[float], width: int = 60) -> str:
    """Values as a line of blocks, the highest a whole one."""
    blocks = " ▁▂▃▄▅▆▇█"
    columns = min(width, len(values))
    chosen = [values[column * len(values) // columns] for column in range(columns)]
    return "".join(blocks[math.ceil(8 * value / max(values))] if value > 0 else " " for value in chosen)


def show_plan(config: DictConfig) -> Plan:
    """Print the plan of a training."""
    plan = make_plan(config)
    describe = instantiate(config.optimizer, "optimizer").describe(plan.batch)
    get_console().print(plan_table(plan, config, describe))
    return plan
