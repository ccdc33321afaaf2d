"""`plan=true`: what a training would do and take, without data, GPU or time."""

import math
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import Tensor, UntypedStorage, nn

from vitrail.data import Augmentation
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.cost import Cost, measure_cost
from vitrail.objectives.contract import passes_of
from vitrail.reporting.plan import PEAK, UTILISATION, Plan, plan_table
from vitrail.runs.assembly import build_model, model_name
from vitrail.runs.config import instantiate, settle_model
from vitrail.training import CosineSchedule, OptimizerFactory
from vitrail.types import height_width

_NEEDED = ("data.root", "data.label_maps", "init_from")


def plan(config: DictConfig) -> Plan:
    """Print the plan of a training."""
    settle_model(config)
    made = make_plan(config)
    get_console().print(plan_table(made))
    return made


def make_plan(config: DictConfig) -> Plan:
    """Compute the plan of a training; of the data only the number of images and classes is looked at, if it is there.

    Raises:
        ConfigError: a setting cannot work.
    """
    config = config.copy()
    missing = _take_missing(config)
    images, classes = _data_size(config, missing)
    sides = height_width(config.data.get("image_size") or 224)
    model: Any = build_model(config.model, config.model.get("num_classes") or classes, sides)
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
    cost, teacher = measure_cost(model, sides), _teacher_cost(config)
    passes = passes_of(instantiate(config.objective, "objective"))
    saved = passes * activation_bytes(model, sides) * (0.5 if "16" in str(trainer.precision) else 1.0)
    states = 4 if optimizer.name in ("sgd", "momentum", "lion") else 8
    averaged = 0 if config.callbacks.get("ema") is None else 4
    # Two operations a multiply-accumulate; the backward pass is twice the forward pass, and a teacher has none.
    work = 6 * cost.macs * passes + (2 * teacher.macs if teacher else 0)
    speed = devices * PEAK * UTILISATION / work if _on_gpus(trainer) else None
    sharing = devices if config.strategy.get("_target_") == "vitrail.training.FSDP" else 1  # except a gathered block
    held = cost.parameters * (8 + states + averaged) / sharing + (4 * teacher.parameters if teacher else 0)
    epochs = int(trainer.max_epochs)
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
        rates=_rates(schedule, optimizer.scaled_lr(batch), epochs),
        groups=groups,
        activations=saved,
        memory=held + saved * per_device,
        images_per_second=speed,
        hours=None if steps is None or speed is None else steps * batch * epochs / speed / 3600,
        disk=2 * cost.parameters * (4 + states + averaged),
        augmentation=describe_augmentation(augment, config.data.get("hflip", 0.5), mixing),
        optimizer=optimizer.describe(batch),
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
    sides = height_width(config.teacher.image_size or published.input_size[1:])
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
        if isinstance(value, str) and value.startswith("${vitrail.needed:"):
            missing.append(key)
            OmegaConf.update(config, key, None)
    return missing


def _on_gpus(trainer: DictConfig) -> bool:
    return trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())


def _data_size(config: DictConfig, missing: list[str]) -> tuple[int | None, int]:
    """Return the number of training images and of classes; of the published data set if its files are not here."""
    published = config.data.get("published_size")
    if "root" in config.data and config.data.root is None:
        missing.insert(0, "data.root")
    else:
        try:
            data = instantiate(config.data, "data", augment=Augmentation())
            return len(data.source.open("train")), data.num_classes
        except ConfigError:
            if published is None:
                raise
    if published is not None:
        return int(published[0]), int(published[1])
    return None, config.model.get("num_classes") or 1000


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


def describe_augmentation(augment: Augmentation, hflip: float, mixing: Any) -> list[str]:
    """Return what happens to a training image, in words, one step per line."""
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
