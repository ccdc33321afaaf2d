"""The training job: build everything from a config, check that it fits together, fit, report."""

import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import get_console
from torch import nn

from hydra_plugins.vitrail_secrets import redact_logs, redacted
from vitrail.data import ImageDataModule, MixToken
from vitrail.errors import ConfigError
from vitrail.insight import training_report
from vitrail.models.checkpoints import backbone_weights, check_weights, load_checkpoint, read_checkpoint
from vitrail.models.heads import DenseHead
from vitrail.models.teacher import Teacher
from vitrail.run.config import check_keys, instantiate, plain, restore
from vitrail.run.directory import RunDirectory, find_checkpoint, is_rank_zero
from vitrail.run.loggers import MetricsCSV
from vitrail.run.preservation import (
    AtomicCheckpointIO,
    NextBatch,
    Stopped,
    check_space,
    lost_process,
    tell_of_lost_children,
)
from vitrail.run.reproduction import comparison, recorded_config
from vitrail.training import ImageClassifier

log = logging.getLogger(__name__)

# Lightning and PyTorch warn of what is meant here, or of each other.
_EXPECTED_WARNINGS = (
    ".*isinstance.treespec, LeafSpec.*",
    "You have overridden `on_after_batch_transfer`.*",
    ".*does not have many workers.*",
    "The number of training batches .* is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    "You're resuming from a checkpoint that ended before the epoch ended.*",  # NextBatch sees to that
)


def train(config: DictConfig) -> dict[str, Any]:
    """Run the training that `config` describes; returns what results.json holds.

    Raises:
        ConfigError: a setting cannot work; raised before any process or training starts, where that can be known.
    """
    run = RunDirectory(HydraConfig.get().runtime.output_dir)
    set_up_logging()
    defaults = compose("train")
    check_keys(config, defaults)
    if config.resume and config.reproduce:
        raise ConfigError("reproduce: begins anew; leave resume=... away.")
    if config.resume:
        config = restore(config, defaults, run.path)
    if is_rank_zero():
        managed = {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys()
        run.claim(120 if managed else 0)  # a file server may notice that late that a machine has died
    if config.get("reproduce"):
        config = recorded_config(config, defaults, run.path)
    elif not config.resume and run.last.is_file():
        config = go_on(config, run)
    config.trainer = given_processes(config.trainer)
    check_devices(config.trainer)
    L.seed_everything(config.seed, workers=True, verbose=False)

    data: ImageDataModule = instantiate(config.data, "data", augment=instantiate(config.augment, "augment"))
    module = build_module(config, data)
    check_space(run.checkpoints, module.model, averaged=bool((config.callbacks or {}).get("ema")))
    csv_log = MetricsCSV(run.path / "metrics.csv")
    trainer = build_trainer(config, run, data, csv_log)
    if is_rank_zero():
        run.record(redacted(plain(config)), redacted(list(HydraConfig.get().overrides.task)))
    log_settings(config, module, data, trainer, run)

    tell_of_lost_children(run.path)
    started = time.monotonic()
    checkpoint = checkpoint_to_resume(config, run, module.model)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stopped:
        log.info("%s in epoch %d, saved; resume=%s goes on", stopped, trainer.current_epoch + 1, run.path)
        sys.exit(stopped.status(trainer))
    except RuntimeError as error:
        if lost := lost_process(error, run.path):
            raise lost from error
        raise
    except SystemExit:  # how Lightning ends after a Ctrl-C that comes before the first step
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    results = summarise(csv_log, trainer, time.monotonic() - started, run)
    if trainer.is_global_zero:
        run.write_results(results)
        get_console().print(training_report(results, run.path), soft_wrap=True)
        if config.get("reproduce"):
            table, same = comparison(Path(config.reproduce), run.path)
            get_console().print(table)
            run.write_results({**results, "reproduced": same})
    return results


def set_up_logging() -> None:
    """Let Lightning's messages go where ours go (terminal and log file), and keep ranks other than 0 quiet.

    Secrets go nowhere.
    """
    redact_logs()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a log file that cannot be written to any more is no reason to stop
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not is_rank_zero():
        for logger_name in (None, "vitrail"):
            logging.getLogger(logger_name).setLevel(logging.WARNING)


def go_on(config: DictConfig, run: RunDirectory) -> DictConfig:
    """`config`, to resume the training that its run directory holds: torchrun or SLURM has started it again.

    Raises:
        ConfigError: it holds another training.
    """
    before, now = (redacted(plain(tree)) for tree in (OmegaConf.load(run.path / "config.yaml"), config))
    for tree in (before, now):
        tree.pop("resume")
        for key in ("devices", "num_nodes"):
            tree["trainer"].pop(key)
    if before != now:
        raise ConfigError(f"hydra.run.dir={run.path}: holds another training; give this one another (or --rdzv-id).")
    log.info("started again in %s: going on", run.path)
    with open_dict(config):
        config.resume = str(run.path)
    return config


def given_processes(trainer: DictConfig) -> DictConfig:
    """The trainer's config for the processes that torchrun has started, whose number it decides."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return trainer
    restarts, kept = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if restarts != "0" and kept == "True":  # github.com/pytorch/pytorch/issues/135712
        log.warning(
            "torchrun --max-restarts=%s: processes that are started again may look for those that are gone; start"
            " torchrun with --rdzv-backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.",
            restarts,
        )
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    given = OmegaConf.merge(trainer, {"devices": local, "num_nodes": world // local})
    assert isinstance(given, DictConfig)
    return given


def check_devices(trainer: DictConfig) -> None:
    """Refuse devices that this machine lacks before any process is started.

    Raises:
        ConfigError: names the key.
    """
    if trainer.accelerator in ("gpu", "cuda"):
        available = torch.cuda.device_count()
        if available == 0:
            raise ConfigError(f"trainer.accelerator={trainer.accelerator}: no GPU is visible here; trainer=cpu works.")
        if isinstance(trainer.devices, int) and trainer.devices > available:
            raise ConfigError(f"trainer.devices={trainer.devices}: only {available} GPUs are visible here.")


def build_model(config: DictConfig, data: ImageDataModule) -> nn.Module:
    """The backbone of `config.model` for the classes and the image size of `data`.

    Raises:
        ConfigError: `model.num_classes` is set and does not fit the data.
    """
    asked = config.model.num_classes
    if asked is not None and asked != data.num_classes:
        raise ConfigError(f"model.num_classes={asked} does not fit the data, which has {data.num_classes} classes.")
    return instantiate(config.model, "model", num_classes=data.num_classes, img_size=data.pixels.size)


def build_module(config: DictConfig, data: ImageDataModule) -> ImageClassifier:
    """The LightningModule of a training.

    Raises:
        ConfigError: parts that do not fit together.
    """
    mixing = data.augment.mix
    if mixing is not None and data.batch_size % 2:
        raise ConfigError(f"data.batch_size={data.batch_size}: must be even, augment.mix pairs the images of a batch.")
    model, objective = build_model(config, data), instantiate(config.objective, "objective")
    check_token_labels(model, objective, data)
    check_submodels(model, objective)
    if config.ckpt is not None and not config.resume:
        allowed = ["aux_head.*"] if isinstance(model, DenseHead) else []  # a new head may start untrained
        load_checkpoint(model, find_checkpoint(config.ckpt), allow=allowed)
    module = ImageClassifier(
        model,
        objective,
        data.num_classes,
        optimizer=instantiate(config.optimizer, "optimizer"),
        schedule=instantiate(config.schedule, "schedule"),
        mixing=mixing,
        seed=config.seed,
        compile_mode=config.compile,
        checkpointing=config.checkpointing,
        teacher=build_teacher(config, objective, data),
    )
    if config.compile is None:  # lets the summary count operations, by a forward pass that would be compiled in vain
        size = data.pixels.size
        module.example_input_array = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))
    return module


def check_token_labels(model: nn.Module, objective: Any, data: ImageDataModule) -> None:
    """Refuse a backbone, an objective, a mixing and data that cannot do token labelling together.

    Raises:
        ConfigError: names the key to change.
    """
    wants_tokens, mixing = getattr(objective, "needs_tokens", False), data.augment.mix
    if wants_tokens and not isinstance(model, DenseHead):
        raise ConfigError(
            f"objective: token labelling needs token logits, which {type(model).__name__} has not; set"
            " model.dense_head=true or choose an LV-ViT."
        )
    if wants_tokens and data.label_maps is None and objective.dense_weight:
        raise ConfigError(
            "data.label_maps: not set, but objective=token_labeling reads them; objective=cross_entropy teaches every"
            " token the image's label instead."
        )
    if data.label_maps is not None and not wants_tokens and not getattr(objective, "needs_teacher", False):
        raise ConfigError("data.label_maps: this objective reads none; set objective=token_labeling.")
    if isinstance(mixing, MixToken) and not wants_tokens:
        raise ConfigError("augment.mix: MixToken needs targets of tokens; set objective=token_labeling.")


def check_submodels(model: nn.Module, objective: Any) -> None:
    """Refuse to compare a network with itself.

    Raises:
        ConfigError: the objective compares submodels, and nothing makes them differ.
    """
    drawn = any(getattr(module, "drop_prob", 0) or getattr(module, "p", 0) for module in model.modules())
    if getattr(objective, "submodels", 1) > 1 and not drawn:
        raise ConfigError("model.drop_path_rate: 0, so that the submodels of objective=cosub are all the same one.")


def build_teacher(config: DictConfig, objective: Any, data: ImageDataModule) -> Teacher | None:
    """The teacher of a distillation; None where there is none, or where label maps hold what it said.

    Raises:
        ConfigError: objective, teacher and data that cannot work together.
    """
    wanted, node = getattr(objective, "needs_teacher", False), config.get("teacher")
    if not wanted:
        if node is not None:
            raise ConfigError("teacher: this objective asks none; set objective=distillation.")
        return None
    if node is None and data.label_maps is None:
        raise ConfigError(
            "teacher: not set, but objective=distillation learns from one; teacher=regnety_160 is DeiT's."
        )
    if node is None:
        return None
    if data.label_maps is not None:
        raise ConfigError("data.label_maps: hold what a teacher said; leave them away, or the teacher (~teacher).")
    return Teacher(instantiate(node, "teacher"), data.pixels.mean, data.pixels.std, data.classes)


class _KeepConfig(L.Callback):
    """Put the config and the class names into each checkpoint, so that it can be used without its run directory."""

    def __init__(self, config: dict[str, Any], classes: list[str]) -> None:
        self.content = {"config": config, "classes": list(classes)}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.content)


def build_trainer(config: DictConfig, run: RunDirectory, data: ImageDataModule, csv_log: MetricsCSV) -> L.Trainer:
    """Lightning's Trainer with the callbacks and loggers that the config names."""
    named = {name: instantiate(node, f"callbacks.{name}") for name, node in (config.callbacks or {}).items()}
    callbacks = [callback for callback in named.values() if callback is not None]
    callbacks += [_KeepConfig(redacted(plain(config)), data.classes), NextBatch()]
    loggers = [csv_log]
    for name, node in (config.logger or {}).items():
        if node is not None:
            loggers.append(instantiate(node, f"logger.{name}"))
    trainer: L.Trainer = instantiate(
        config.trainer,
        "trainer",
        strategy=instantiate(config.strategy, "strategy"),
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *slurm_environment(config.trainer)],
        default_root_dir=str(run.path),
    )
    for logger in loggers:
        if not (config.resume and isinstance(logger, MLFlowLogger)):  # MLflow refuses a run whose parameters change
            logger.log_hyperparams(redacted(plain(config)))
    return trainer


def slurm_environment(trainer: DictConfig) -> list[SLURMEnvironment]:
    """Lightning's SLURM environment where srun started the processes; signals are KeepWork's, not its requeueing's."""
    tasks, devices = os.environ.get("SLURM_NTASKS"), trainer.devices
    wanted = str(devices * trainer.num_nodes) if isinstance(devices, int) else tasks
    managed = SLURMEnvironment.detect() and tasks == wanted and "TORCHELASTIC_RUN_ID" not in os.environ
    return [SLURMEnvironment(auto_requeue=False)] if managed else []


def checkpoint_to_resume(config: DictConfig, run: RunDirectory, model: nn.Module) -> Path | None:
    """The run's last checkpoint when resuming; None starts at the beginning.

    Raises:
        ConfigError: the run is finished, or its checkpoint is of another architecture than `model`.
    """
    if not config.resume:
        return None
    if not run.last.is_file():
        log.warning("resume=%s: no checkpoint yet, starting at the beginning.", config.resume)
        return None
    checkpoint = read_checkpoint(run.last, values=False)
    check_weights(model, backbone_weights(checkpoint, ema=False), source=str(run.last))
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if epochs >= config.trainer.max_epochs:
        raise ConfigError(
            f"resume={config.resume}: its {epochs} epochs are done; add epochs=N with a larger N to go on."
        )
    return run.last


def log_settings(
    config: DictConfig, module: ImageClassifier, data: ImageDataModule, trainer: L.Trainer, run: RunDirectory
) -> None:
    """Say what is about to happen, the learning rate and the effective batch above all."""
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    log.info("run directory %s", run.path)
    log.info(
        "%s, %.2f M parameters, %s px, %d classes",
        config.model.name,
        parameters / 1e6,
        data.pixels.size,
        data.num_classes,
    )
    log.info("%s", instantiate(config.optimizer, "optimizer").describe(batch))
    log.info("%d x %s, precision %s", trainer.world_size, trainer.accelerator.name(), config.trainer.precision)


def summarise(csv_log: MetricsCSV, trainer: L.Trainer, seconds: float, run: RunDirectory) -> dict[str, Any]:
    """Best accuracies over all epochs, and how the training ran."""
    rows = csv_log.rows.values()
    speeds = [row["speed/images_per_second"] for row in rows if "speed/images_per_second" in row]
    skipped = run.path / "skipped.txt"
    results: dict[str, Any] = {
        metric: csv_log.best(metric)
        for metric in ("val/top1", "val/top5", "val/top1_ema", "val/top5_ema")
        if csv_log.best(metric) is not None
    }
    return {
        **results,
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 1),
        "images_per_second": round(statistics.median(speeds), 1) if speeds else 0.0,
        "skipped_images": len(set(skipped.read_text(encoding="utf-8").splitlines())) if skipped.is_file() else 0,
        "last": _floats(trainer.callback_metrics),
    }


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
