"""`plan=true`: estimate what a training does and costs, without running it and without its data."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import Tensor, UntypedStorage, nn

from vitrail.data import Augmentation
from vitrail.data.phases import Phases
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.cost import Cost, measure_cost
from vitrail.models.heads import declared_outputs
from vitrail.objectives.contract import passes_of
from vitrail.reporting.plan import PEAK, UTILISATION, PhaseCost, Plan, plan_table
from vitrail.runs.assembly import build_model, model_name
from vitrail.runs.config import instantiate, settle_model
from vitrail.runs.phases import build_phases, fit_to_phases
from vitrail.training import CosineSchedule, OptimizerFactory
from vitrail.types import InputSpec, height_width

_TYPICAL = (375, 500)  # (height, width) of an image of ImageNet, in pixels
_SAMPLE = 1000  # views
_NEEDED = ("data.root", "data.label_maps", "init_from")


def plan(config: DictConfig) -> Plan:
    """Print the plan of a training, and return it."""
    settle_model(config)
    made = make_plan(config)
    get_console().print(plan_table(made))
    return made


def make_plan(config: DictConfig) -> Plan:
    """Compute the plan of a training; if the data is available, only its images and classes are counted.

    Raises:
        ConfigError: a setting is invalid.
    """
    config = config.copy()
    missing = _take_missing(config)
    images, classes, source = _data_size(config, missing)
    sides = height_width(config.data.get("image_size") or 224)
    untrained = {"pretrained": False} if "pretrained" in config.model else {}  # a plan downloads no weights
    model: Any = build_model(config.model, config.model.get("num_classes") or classes, sides, **untrained)
    if "masks" in declared_outputs(model):
        raise ConfigError("plan=true: plans trainings of classifiers only, not of segmentation; omit it.")
    if config.grad_checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    optimizer: OptimizerFactory = instantiate(config.optimizer, "optimizer")
    schedule: CosineSchedule = instantiate(config.schedule, "schedule")
    augment: Augmentation = instantiate(config.augment, "augment")
    mixing = instantiate(config.mixing, "mixing")
    trainer = config.trainer
    devices = (trainer.devices if isinstance(trainer.devices, int) else 1) * trainer.num_nodes
    per_device = config.data.get("batch_size") or 128
    per_step = per_device * devices
    batch = per_step * trainer.accumulate_grad_batches
    steps = None if images is None else math.ceil((images // per_step) / trainer.accumulate_grad_batches)
    groups: dict[float, int] = {}
    for group in optimizer.build(model, batch).param_groups:
        amount = float(group["weight_decay"])
        groups[amount] = groups.get(amount, 0) + sum(parameter.numel() for parameter in group["params"])
    phases = build_phases(config, sides)
    if phases is not None:
        fit_to_phases(model, phases, classes)
    cost, teacher = measure_cost(model, sides), _teacher_cost(config)
    passes = passes_of(instantiate(config.objective, "objective"))
    activations = passes * activation_bytes(model, sides) * (0.5 if "16" in str(trainer.precision) else 1.0)
    states = 4 if optimizer.name in ("sgd", "momentum", "lion", "muon", "nmuon") else 8
    ema = 0 if config.callbacks.get("ema") is None else 4

    def speed_of(macs: int) -> float | None:
        """Return the images per second of a backbone with `macs`; None for CPUs."""
        # Two operations per multiply-accumulate; a backward pass costs two forward passes, and a teacher has none.
        work = 6 * macs * passes + (2 * teacher.macs if teacher else 0)
        return devices * PEAK * UTILISATION / work if _on_gpus(trainer) else None

    speed = speed_of(cost.macs)
    # With FSDP each device holds one share; the gathered weights of the current block are neglected.
    shards = devices if config.strategy.get("_target_") == "vitrail.training.FSDP" else 1
    state_bytes = cost.parameters * (8 + states + ema) / shards + (4 * teacher.parameters if teacher else 0)
    epochs = int(trainer.max_epochs)
    render = config.data.get("render") or "auto"
    renders_on_device = render == "device" or (
        render == "auto" and _on_gpus(trainer) and augment.device_problem() is None
    )
    hours = None if steps is None or speed is None else steps * batch * epochs / speed / 3600
    costs = [] if phases is None else phase_costs(model, phases, None if steps is None else steps * batch, speed_of)
    return Plan(
        name=model_name(config.model),
        missing=missing,
        image_size=sides,
        classes=classes,
        images=images,
        cost=cost,
        teacher=teacher,
        teacher_name="" if config.teacher is None else str(config.teacher.get("name", "a run")),
        devices=devices,
        batch_per_device=per_device,
        accumulated=trainer.accumulate_grad_batches,
        batch=batch,
        steps=steps,
        epochs=epochs,
        rates=_rates(schedule, optimizer.scaled_lr(batch), epochs, phases),
        groups=groups,
        activations=activations,
        memory=state_bytes + activations * per_device,
        images_per_second=speed,
        hours=sum(part.hours or 0 for part in costs) if costs and hours is not None else hours,
        disk=2 * cost.parameters * (4 + states + ema),
        augmentation=describe_augmentation(augment, config.data.get("hflip", 0.5), mixing),
        optimizer=optimizer.describe(batch),
        phases=costs,
        equal_epochs=epochs if phases is None else phases.compute(epochs),
        by="epochs" if phases is None else phases.by,
        stored=_declared(source, "describe", ""),
        storage=_declared(source, "storage", "files"),
        render="device" if renders_on_device else "loader",
        bytes_per_image=_bytes_per_image(augment, config, sides, renders_on_device),
    )


def phase_costs(
    model: nn.Module, phases: Phases, images_per_epoch: int | None, speed_of: Callable[[int], float | None]
) -> list[PhaseCost]:
    """Estimate the cost of each image size in turn.

    Args:
        model: backbone that can run at the sizes of all phases.
        phases: phases of the training.
        images_per_epoch: training images in an epoch; None if unknown.
        speed_of: maps multiply-accumulates per image to images per second.
    """
    costs = []
    for size, same in groupby(phases.phases, key=lambda phase: phase.size):
        parts = list(same)
        magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
        epochs, macs = sum(part.epochs for part in parts), measure_cost(model, size).macs
        images, speed = None if images_per_epoch is None else images_per_epoch * epochs, speed_of(macs)
        hours = None if images is None or speed is None else images / speed / 3600
        extremes = (min(magnitudes), max(magnitudes)) if magnitudes else None
        costs.append(PhaseCost(size, extremes, epochs, macs, images, speed, hours))
    return costs


def _teacher_cost(config: DictConfig) -> Cost | None:
    """Return the teacher's cost for one image of its input size; its weights are not loaded."""
    if config.teacher is None:
        return None
    if "name" not in config.teacher:
        teacher = instantiate(config.teacher, "teacher")
        return measure_cost(teacher.model, teacher.image_size)
    published = timm.get_pretrained_cfg(config.teacher.name)
    if published is None:
        raise ConfigError(f"teacher.name={config.teacher.name}: no such backbone; timm.list_models() shows all.")
    sides = height_width(config.teacher.image_size or published.input_size[1:])
    try:
        with torch.device("meta"):  # allocates no memory
            model = create_model(config.teacher.name, published.num_classes, sides)
    except NotImplementedError:  # older versions of timm compute with tensor values while they build RegNets
        model = create_model(config.teacher.name, published.num_classes, sides)
    return measure_cost(model, sides)


def _take_missing(config: DictConfig) -> list[str]:
    """Return the required keys that are not set, and set them to null."""
    missing = []
    for key in _NEEDED:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group) if group else config
        value = OmegaConf.to_container(node, resolve=False)[name] if name in node else None  # type: ignore[index,call-overload]
        if isinstance(value, str) and value.startswith("${vitrail.needed:"):
            missing.append(key)
            OmegaConf.update(config, key, None)
    return missing


def _on_gpus(trainer: DictConfig) -> bool:
    return trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())


def _data_size(config: DictConfig, missing: list[str]) -> tuple[int | None, int, Any]:
    """Return the number of training images and of classes, and the source.

    The numbers are the published ones if the files are not available; there is no source then.
    """
    published = config.data.get("published_size")
    if "root" in config.data and config.data.root is None:
        missing.insert(0, "data.root")
    else:
        try:
            data = instantiate(config.data, "data", augment=Augmentation())
            return len(data.source.open("train")), data.num_classes, data.source
        except ConfigError:
            if published is None:
                raise
    if published is not None:
        return int(published[0]), int(published[1]), None
    return None, config.model.get("num_classes") or 1000, None


def _declared(source: Any, name: str, default: str) -> str:
    """Return what a source declares about itself: the result of its method `name`."""
    method = getattr(source, name, None)
    return default if method is None else method()


def _bytes_per_image(
    augment: Augmentation, config: DictConfig, sides: tuple[int, int], on_device: bool
) -> float | None:
    """Return the bytes of an average training image on its way to the device, from a sample of views."""
    if not on_device:
        return 4.0 * 3 * sides[0] * sides[1]
    if augment.crop_last or augment.shift is not None:
        return 3.0 * _TYPICAL[0] * _TYPICAL[1]
    mean, std = config.data.get("mean"), config.data.get("std")
    views = augment.views(InputSpec(sides, tuple(mean or (0.5,) * 3), tuple(std or (0.5,) * 3)), 0.5)
    crops = [views.draw_view(_TYPICAL, 0, index).steps[0].values for index in range(_SAMPLE)]
    return 3.0 * sum(height * width for _, _, height, width, _ in crops) / _SAMPLE


def _rates(schedule: CosineSchedule, peak: float, epochs: int, phases: Phases | None = None) -> list[float]:
    """Return the learning rate in the middle of each epoch, for per-step and per-epoch schedules."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = schedule.build(optimizer, epochs, steps_per_epoch=100)
    rates = []
    for epoch in range(epochs):
        positions = (epoch, epoch + 0.5)
        begin, middle = positions if phases is None else map(phases.schedule_epochs, positions)
        schedule.advance(scheduler, begin, 100 * middle)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def activation_bytes(model: nn.Module, sides: tuple[int, int]) -> int:
    """Return the bytes of activations per image that a float32 training step saves for the backward pass.

    Measured in a forward pass of two images of (height, width) `sides`.
    """
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, UntypedStorage] = {}  # keeps the storages alive, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_heads(model, torch.zeros(2, 3, *sides))
    return sum(storage.nbytes() for storage in kept.values()) // 2


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
