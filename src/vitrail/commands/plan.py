"""`plan=true`: estimate what a training does and costs, without running it and without its data."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import nn

from vitrail.data import Augmentation
from vitrail.data.phases import Phases
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.models.cost import Cost, activation_bytes, measure_cost, training_operations
from vitrail.objectives.contract import passes_of
from vitrail.reporting.plan import PEAK, UTILISATION, PhaseCost, Plan, describe_augmentation, plan_table
from vitrail.runs.assembly import build_model, model_name
from vitrail.runs.config import instantiate, settle_model
from vitrail.runs.outputs import check_task
from vitrail.runs.phases import build_phases, fit_to_phases
from vitrail.training import OptimizerFactory, ProbeSettings
from vitrail.training.linear_probe import new_classifiers
from vitrail.training.schedules import epoch_rates
from vitrail.types import InputSpec, height_width
from vitrail_runtime.allowed_targets import resolve_target

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
    model, probe = _build_backbone(config, classes, sides), instantiate(config.get("probe"), "probe")
    optimizer: OptimizerFactory = instantiate(config.optimizer, "optimizer")
    augment = instantiate(config.augment, "augment")
    mixing = instantiate(config.mixing, "mixing")
    batch, has_masks = _batch_size(config, images), _has_masks(config)
    groups = _decay_groups(optimizer, model, probe, batch.total)
    phases = build_phases(config, sides)
    if phases is not None:
        fit_to_phases(model, phases, classes)
    cost, teacher = measure_cost(model, sides), _teacher_cost(config)
    passes = passes_of(instantiate(config.objective, "objective"))
    halved = 0.5 if "16" in str(config.trainer.precision) else 1.0
    activations = 0.0 if probe else passes * activation_bytes(model, sides) * halved  # a frozen backbone keeps none
    speed_of = _speed_estimate(config, batch.devices, passes * (1 if probe else 3), teacher)
    speed, epochs = speed_of(cost.macs), int(config.trainer.max_epochs)
    per_epoch = None if batch.steps is None else batch.steps * batch.total
    costs = [] if phases is None else phase_costs(model, phases, per_epoch, speed_of)
    hours = None if per_epoch is None or speed is None else per_epoch * epochs / speed / 3600
    states = 4 if optimizer.name in ("sgd", "momentum", "lion", "muon", "nmuon") else 8
    ema = 0 if config.callbacks.get("ema") is None else 4
    on_device = not has_masks and _renders_on_device(config, augment)
    return Plan(
        name=model_name(config.model),
        missing=missing,
        image_size=sides,
        classes=classes,
        images=images,
        cost=cost,
        teacher=teacher,
        teacher_name="" if config.teacher is None else str(config.teacher.get("name", "a run")),
        devices=batch.devices,
        batch_per_device=batch.per_device,
        accumulated=config.trainer.accumulate_grad_batches,
        batch=batch.total,
        steps=batch.steps,
        epochs=epochs,
        rates=epoch_rates(
            instantiate(config.schedule, "schedule"),
            optimizer.scaled_lr(batch.total),
            epochs,
            batch.steps or 100,  # any number will do, unless the schedule counts steps
            None if phases is None else phases.schedule_epochs,
        ),
        groups=groups,
        activations=activations,
        memory=_state_bytes(config, cost, teacher, sum(groups.values()), states, ema) + activations * batch.per_device,
        images_per_second=speed,
        hours=sum(part.hours or 0 for part in costs) if costs and hours is not None else hours,
        disk=2 * (cost.parameters * (4 + ema) + sum(groups.values()) * states),
        augmentation=augment.describe()
        if has_masks
        else describe_augmentation(augment, config.data.get("hflip", 0.5), mixing),
        optimizer=optimizer.describe(batch.total),
        phases=costs,
        equal_epochs=epochs if phases is None else phases.compute(epochs),
        by="epochs" if phases is None else phases.by,
        stored=_declared(source, "describe", ""),
        storage=None if has_masks else _declared(source, "storage", "files"),
        render="device" if on_device else "loader",
        bytes_per_image=None if has_masks else _bytes_per_image(augment, config, sides, on_device),
    )


class _Batch(NamedTuple):
    """Images per step."""

    per_device: int
    devices: int
    total: int
    """Effective batch size: over all devices and accumulated batches."""
    steps: int | None
    """Optimiser steps per epoch; None if the number of images is unknown."""


def _batch_size(config: DictConfig, images: int | None) -> _Batch:
    trainer, per_device = config.trainer, config.data.get("batch_size") or 128
    devices = (trainer.devices if isinstance(trainer.devices, int) else 1) * trainer.num_nodes
    per_step, accumulated = per_device * devices, trainer.accumulate_grad_batches
    batches = config.data.get("batches_per_epoch") or (None if images is None else images // per_step)
    steps = None if batches is None else math.ceil(batches / accumulated)
    return _Batch(per_device, devices, per_step * accumulated, steps)


def _build_backbone(config: DictConfig, classes: int, sides: tuple[int, int]) -> nn.Module:
    """Build the backbone without downloading weights."""
    untrained = {"pretrained": False} if "pretrained" in config.model else {}
    model: Any = build_model(config.model, config.model.get("num_classes") or classes, sides, **untrained)
    check_task(model, _has_masks(config))
    if config.grad_checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    return model


def _decay_groups(
    optimizer: OptimizerFactory, model: nn.Module, probe: ProbeSettings | None, batch: int
) -> dict[float, int]:
    """Return the number of trained parameters by weight decay."""
    others = {}
    if probe is not None:
        others = {str(number): part for number, part in enumerate(new_classifiers(model, len(probe.lr_factors)))}
        model.requires_grad_(False)
    groups: dict[float, int] = {}
    for group in optimizer.build(model, batch, others).param_groups:
        amount = float(group["weight_decay"])
        groups[amount] = groups.get(amount, 0) + sum(parameter.numel() for parameter in group["params"])
    return groups


def _speed_estimate(
    config: DictConfig, devices: int, forward_passes: int, teacher: Cost | None
) -> Callable[[int], float | None]:
    """Return a function from a backbone's multiply-accumulates to images per second; to None for CPUs.

    A backward pass counts as two forward passes; a teacher has none.
    """

    def speed_of(macs: int) -> float | None:
        work = training_operations(macs, forward_passes, teacher.macs if teacher else 0)
        return devices * PEAK * UTILISATION / work if _on_gpus(config.trainer) else None

    return speed_of


def _state_bytes(config: DictConfig, cost: Cost, teacher: Cost | None, trained: int, states: int, ema: int) -> float:
    """Return the bytes of weights, gradients, moments, EMA weights and teacher on one device.

    With FSDP each device holds one share; the gathered weights of the current block are neglected.
    """
    sharded = config.strategy.get("_target_") == "vitrail.training.FSDP"
    shards = _batch_size(config, None).devices if sharded else 1
    own = cost.parameters * (4 + ema) + trained * (4 + states)
    return own / shards + (4 * teacher.parameters if teacher else 0)


def _renders_on_device(config: DictConfig, augment: Augmentation) -> bool:
    render = config.data.get("render") or "auto"
    return render == "device" or (render == "auto" and _on_gpus(config.trainer) and augment.device_problem() is None)


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


def _has_masks(config: DictConfig) -> bool:
    return getattr(resolve_target(str(config.data.get("_target_"))), "has_masks", False)


def _data_size(config: DictConfig, missing: list[str]) -> tuple[int | None, int, Any]:
    """Return the number of training images and of classes, and the source.

    The numbers are the published ones if the files are not available; there is no source then.
    """
    published = config.data.get("published_size")
    if "root" in config.data and config.data.root is None:
        missing.insert(0, "data.root")
    else:
        try:
            augment = {} if _has_masks(config) else {"augment": Augmentation()}
            data = instantiate(config.data, "data", **augment)
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
