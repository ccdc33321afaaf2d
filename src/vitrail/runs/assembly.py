"""Build the parts of a training from its config, and check that they fit together."""

import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from vitrail.checkpoints.fitting import fit_weights, load_checkpoint, load_weights
from vitrail.checkpoints.reading import Origin
from vitrail.checkpoints.writing import AtomicCheckpointIO
from vitrail.data import ImageDataModule
from vitrail.errors import ConfigError
from vitrail.models.heads import declared_outputs, return_features
from vitrail.models.licences import inherited_licence
from vitrail.models.teacher import Teacher
from vitrail.objectives.contract import passes_of, uses_of
from vitrail.runs.config import instantiate, plain
from vitrail.runs.device import settle_auto
from vitrail.runs.directory import RunDirectory, find_weights_file
from vitrail.runs.loggers import MetricsCSV
from vitrail.runs.outputs import check_outputs, check_task
from vitrail.runs.phases import build_phases, fit_to_phases
from vitrail.runs.probe import build_probe, probe_settings
from vitrail.runs.resume import ResumePosition
from vitrail.training import ImageClassifier
from vitrail.training.targets import check_contracts
from vitrail.types import InputSpec
from vitrail_runtime.allowed_targets import resolve_target
from vitrail_runtime.compat import set_ddp_options
from vitrail_runtime.secrets import redacted

log = logging.getLogger(__name__)


_SWITCHES = {
    "enable_progress_bar": ProgressBar,
    "enable_checkpointing": Checkpoint,
}
_UNSUPPORTED = {
    "StochasticWeightAveraging": "replaces the schedule by one that does not fit timm's; use callbacks.ema",
    "BackboneFinetuning": "needs a module with the attribute `backbone`; use optimizer.backbone_lr_scale",
}
# Targets known to return what they declare.
_CHECKED = tuple(f"vitrail.models.{name}" for name in ("create_model", "upernet", "linear_segmenter"))


def build_data(config: DictConfig) -> ImageDataModule:
    """Build the data module with its augmentation and phases."""
    data: ImageDataModule = instantiate(config.data, "data", augment=instantiate(config.augment, "augment"))
    if (phases := build_phases(config, data.input.size)) is not None:
        data.set_phases(phases)
    if (probe := probe_settings(config)) is not None:
        data.set_probe(probe.held_out, probe.cache)
    return data


def model_name(node: Any) -> str:
    """Return the name of a model config: timm's name, or the name of the class or function that builds the model."""
    check_name(node)
    return str(node.get("name") or str(node["_target_"]).rpartition(".")[2])


def check_name(node: Any) -> None:
    """Check that a model config has its name, if it needs one.

    Raises:
        ConfigError: it has none.
    """
    if OmegaConf.is_config(node) and OmegaConf.is_missing(node, "name"):
        raise ConfigError(
            "model.name: not set; list_models.py lists the names, and each file in conf/model those of its family."
        )


def build_model(node: Any, num_classes: int, image_size: tuple[int, int], **kwargs: Any) -> nn.Module:
    """Build the backbone that a config describes.

    `_target_` can be any callable that returns a module. `num_classes` and `img_size` are passed to it if it has
    arguments of these names that the config does not set.

    Args:
        node: config with a `_target_`.
        num_classes: number of classes, C.
        image_size: (height, width) in pixels.
        kwargs: arguments that override the config's, if the callable has them (`pretrained`).

    Raises:
        ConfigError: the config's `num_classes` does not fit, or the backbone does not return what it declares.
    """
    if "_target_" not in node:
        raise ConfigError("model._target_: not set; set it to a class or function that builds the backbone.")
    check_name(node)
    asked = node.get("num_classes")
    if asked is not None and asked != num_classes:
        raise ConfigError(f"model.num_classes={asked} does not fit the data, which has {num_classes} classes.")
    if node.get("in_chans") not in (None, 3):
        raise ConfigError(
            f"model.in_chans={node['in_chans']}: all images have three channels, also grey ones; omit it."
        )
    wanted = {"num_classes": num_classes, "img_size": image_size, **kwargs}
    target = str(node["_target_"])
    accepted = inspect.signature(resolve_target(target)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    passed = {
        name: value
        for name, value in wanted.items()
        if (name in accepted or (takes_any and name != "img_size")) and (name in kwargs or node.get(name) is None)
    }
    model = instantiate(node, "model", **passed)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model._target_={target}: returns a {type(model).__name__}, not a torch module.")
    if target not in _CHECKED:
        check_outputs(model, num_classes, image_size)
    return model


def fit_pretrained_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Reorder or replace the classifier of pretrained weights if the data's classes are not ImageNet's."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    subset = infer_imagenet_subset(cfg)
    names = ImageNetInfo(subset).label_names() if subset else None
    if names is None or len(names) != len(classes) or names == list(classes):
        return  # timm replaces the classifier itself if the number of classes differs
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    initial: Any = model
    initial.reset_classifier(len(classes))
    fitted, notes = fit_weights(weights, model, "model.pretrained", origin=Origin(names), classes=classes)
    load_weights(model, fitted, "model.pretrained")
    for note in notes:
        log.info("model.pretrained=true: %s", note)


def log_licence(config: DictConfig) -> None:
    """Log the licence of the published weights from which a training starts, if it starts from such weights."""
    licence = inherited_licence(config)
    if licence or config.model.get("pretrained"):
        log.info("model.name=%s: licence of the weights: %s", model_name(config.model), licence or "not recorded")


def build_teacher(config: DictConfig, spec: InputSpec, classes: list[str] | None) -> Teacher | None:
    """Build the distillation teacher; None if the config has none. `classes` is None if its logits are not used."""
    node = config.get("teacher")
    return None if node is None else Teacher(instantiate(node, "teacher"), spec.mean, spec.std, classes)


def build_module(config: DictConfig, data: ImageDataModule) -> ImageClassifier:
    """Build the LightningModule of a training.

    Raises:
        ConfigError: the parts do not fit together.
    """
    settle_auto(config)
    mixing = instantiate(config.mixing, "mixing")
    if mixing is not None and data.batch_size % 2:
        raise ConfigError(f"data.batch_size={data.batch_size}: must be even, mixing pairs the images of a batch.")
    replaced = {} if config.init_from is None and not config.resume else {"pretrained": False}
    model = build_model(config.model, data.num_classes, data.input.size, **replaced)
    log_licence(config)
    check_task(model, "masks" in data.provides)
    if "masks" in data.provides:
        from vitrail.runs.segmentation import build_segmenter

        return build_segmenter(config, data, model)  # type: ignore[arg-type]
    if data.phases is not None:
        fit_to_phases(model, data.phases, data.num_classes)
    objective = instantiate(config.objective, "objective")
    if "outputs.features" in uses_of(objective):
        return_features(model)
    taught = frozenset() if config.get("teacher") is None else Teacher.provides
    check_contracts(model, objective, mixing, data.provides | taught)
    check_passes(model, objective)
    if config.init_from is not None and not config.resume:
        # New classifiers of tokens may start untrained, and so may modules that the checkpoint's backbone lacks.
        allowed = ["second_order.*", *(["aux_head.*"] if "tokens" in declared_outputs(model) else [])]
        allowed += [f"{name}.*" for name in getattr(model, "new_modules", ())]
        file, _ = find_weights_file(config.init_from, "init_from")
        load_checkpoint(model, file, allow=allowed, key="init_from", classes=data.classes)
    elif config.model.get("pretrained"):
        fit_pretrained_classes(model, data.classes)
    taught_classes = data.classes if "teacher_logits" in uses_of(objective) else None
    settings: dict[str, Any] = {
        "optimizer": instantiate(config.optimizer, "optimizer"),
        "schedule": instantiate(config.schedule, "schedule"),
        "mixing": mixing,
        "targets": instantiate(config.targets, "targets", teacher=build_teacher(config, data.input, taught_classes)),
        "seed": config.seed,
        "compile_mode": config.compile,
    }
    if (probe := probe_settings(config)) is not None:
        module: ImageClassifier = build_probe(probe, model, objective, data, **settings)
    else:
        settings |= {"grad_checkpointing": config.grad_checkpointing, "phases": data.phases}
        settings["channels_last"] = bool(OmegaConf.select(config, "kernels.channels_last"))
        module = ImageClassifier(model, objective, data.num_classes, **settings)
    # The model summary counts operations in a forward pass of the example, which must not trigger a compilation.
    if module.compile_mode is None:
        module.example_input_array = torch.zeros(1, 3, *data.input.size)
    return module


def check_passes(model: nn.Module, objective: nn.Module) -> None:
    """Check that several forward passes of an objective differ, by dropout or drop path.

    Raises:
        ConfigError: the objective compares several passes, and they would be identical.
    """
    drawn = any(getattr(module, "drop_prob", 0) or getattr(module, "p", 0) for module in model.modules())
    if passes_of(objective) > 1 and not drawn:
        passes, name = passes_of(objective), type(objective).__name__
        raise ConfigError(f"model.drop_path_rate=0: the {passes} passes of {name} would be identical; set it above 0.")


class _SaveConfig(L.Callback):
    """Callback that saves config, class names and the network's input in each checkpoint.

    A checkpoint can then be used without its run directory.
    """

    def __init__(self, config: dict[str, Any], data: ImageDataModule) -> None:
        self.config, self.data = config, data

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(config=self.config, classes=list(self.data.classes), input=asdict(self.data.input))


def build_trainer(config: DictConfig, run: RunDirectory, data: ImageDataModule, csv_log: MetricsCSV) -> L.Trainer:
    """Build Lightning's Trainer with the config's callbacks and loggers."""
    named = {name: instantiate(node, f"callbacks.{name}") for name, node in (config.callbacks or {}).items()}
    _check_callbacks(named, config.trainer, run)
    callbacks = [callback for callback in named.values() if callback is not None]
    callbacks += [_SaveConfig(redacted(plain(config)), data), ResumePosition()]
    if data.phases is not None:
        from vitrail.training import PhaseReport

        callbacks.append(PhaseReport(data.phases))
    loggers = [csv_log]
    for name, node in (config.logger or {}).items():
        if node is not None:
            loggers.append(instantiate(node, f"logger.{name}"))
    strategy = instantiate(config.strategy, "strategy")
    trainer: L.Trainer = instantiate(
        config.trainer,
        "trainer",
        strategy=strategy,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *slurm_environment(config.trainer)],
        default_root_dir=str(run.path),
    )
    if isinstance(trainer.strategy, DDPStrategy) and isinstance(strategy, str):  # Lightning's choice: conf/strategy/ddp
        set_ddp_options(trainer.strategy, broadcast_buffers=False, gradient_as_bucket_view=True)
    for logger in loggers:
        if not (config.resume and isinstance(logger, MLFlowLogger)):  # MLflow refuses a run whose parameters change
            logger.log_hyperparams(redacted(plain(config)))
    return trainer


def _check_callbacks(named: dict[str, L.Callback | None], trainer: DictConfig, run: RunDirectory) -> None:
    """Remove callbacks that the trainer disables, and set a folder for additional checkpoint callbacks.

    Raises:
        ConfigError: a callback cannot work with vitrail's modules and schedules.
    """
    for switch, kind in _SWITCHES.items():
        if trainer.get(switch) is False:
            for name in [name for name, callback in named.items() if isinstance(callback, kind)]:
                del named[name]
    for name, callback in named.items():
        if reason := _UNSUPPORTED.get(type(callback).__name__):
            raise ConfigError(f"callbacks.{name}: {type(callback).__name__} {reason}.")
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(run.checkpoints / name)


def slurm_environment(trainer: DictConfig) -> list[SLURMEnvironment]:
    """Return Lightning's SLURM environment if srun started the processes, without its requeueing on signals.

    `Preemption` handles the signals.
    """
    tasks, devices = os.environ.get("SLURM_NTASKS"), trainer.devices
    wanted = str(devices * trainer.num_nodes) if isinstance(devices, int) else tasks
    managed = SLURMEnvironment.detect() and tasks == wanted and "TORCHELASTIC_RUN_ID" not in os.environ
    return [SLURMEnvironment(auto_requeue=False)] if managed else []


def given_processes(trainer: DictConfig) -> DictConfig:
    """Return the trainer config with the number of processes that torchrun has started; unchanged without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return trainer
    restarts, kept = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if restarts != "0" and kept == "True":  # github.com/pytorch/pytorch/issues/135712
        log.warning(
            "torchrun --max-restarts=%s: restarted processes may try to connect to dead ones; start torchrun with"
            " --rdzv-backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.",
            restarts,
        )
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    given = OmegaConf.merge(trainer, {"devices": local, "num_nodes": world // local})
    assert isinstance(given, DictConfig)
    return given


def check_devices(trainer: DictConfig) -> None:
    """Check that this machine has the devices, before any process is started.

    Raises:
        ConfigError: there are too few GPUs; the message names the key.
    """
    if trainer.accelerator in ("gpu", "cuda"):
        available = torch.cuda.device_count()
        if available == 0:
            raise ConfigError(f"trainer.accelerator={trainer.accelerator}: no GPU is visible here; use trainer=cpu.")
        if isinstance(trainer.devices, int) and trainer.devices > available:
            raise ConfigError(f"trainer.devices={trainer.devices}: only {available} GPUs are visible here.")
