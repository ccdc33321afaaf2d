"""Train: build everything from a config, check it, fit and report."""

import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import timm
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich import get_console

from vitrail.checkpoints.writing import check_space
from vitrail.data import ImageDataModule
from vitrail.errors import ConfigError
from vitrail.reporting import training_report
from vitrail.runs.assembly import build_data, build_module, build_trainer, check_devices, given_processes, model_name
from vitrail.runs.config import defaults_of, output_directory, plain, restore, settle_model
from vitrail.runs.device import kernels, settle_auto
from vitrail.runs.directory import RunDirectory, is_rank_zero
from vitrail.runs.keys import check_keys
from vitrail.runs.loggers import MetricsCSV
from vitrail.runs.logs import set_up_logging
from vitrail.runs.preemption import Stopped, explain_dead_children, lost_process
from vitrail.runs.reproduction import comparison, recorded_config, require_recorded_classes
from vitrail.runs.resume import checkpoint_to_resume, continue_restarted
from vitrail.training import ImageClassifier
from vitrail.training.memory import is_out_of_memory, out_of_memory
from vitrail_runtime.secrets import redacted

log = logging.getLogger(__name__)

_HELD_OUT = "held_out/top1"  # of linear probes


def train(config: DictConfig) -> dict[str, Any]:
    """Run the training that `config` describes, and return the contents of results.json.

    Args:
        config: config of the program; in a notebook, `vitrail.runs.compose("train", overrides)`.

    Raises:
        ConfigError: a setting is invalid; raised before the training starts, if possible.
    """
    run = RunDirectory(output_directory())
    set_up_logging()
    config = _final_config(config, run)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config)
    if config.get("reproduce"):
        require_recorded_classes(config.reproduce, data.classes)
    module = build_module(config, data)
    check_space(run.checkpoints, module.model, averaged=bool((config.callbacks or {}).get("ema")))
    csv_log = MetricsCSV(run.path / "metrics.csv")
    trainer = build_trainer(config, run, data, csv_log)
    checkpoint = checkpoint_to_resume(config, run, module.model, data.classes)
    if is_rank_zero():  # only now, so that a refused resume does not change the run
        run.record(redacted(plain(config)), redacted(list(HydraConfig.get().overrides.task)))
    _log_settings(config, module, data, trainer, run)
    explain_dead_children(run.path)
    started = time.monotonic()
    with kernels(config):
        _fit(trainer, module, data, checkpoint, run, config.grad_checkpointing)
    results = _summarise(csv_log, trainer, time.monotonic() - started, run)
    if trainer.is_global_zero:
        run.write_results(results)
        get_console().print(training_report(results, run.path), soft_wrap=True)
        if config.get("reproduce"):
            table, same = comparison(Path(config.reproduce), run.path)
            get_console().print(table)
            run.write_results({**results, "reproduced": same})
    return results


def _final_config(config: DictConfig, run: RunDirectory) -> DictConfig:
    """Return the config to train with: the given one, or that of the run to resume or to reproduce."""
    check_keys(config, "train")
    settle_model(config)
    if config.resume and config.reproduce:
        raise ConfigError("reproduce=... starts a new run and cannot be combined with resume=...")
    if config.resume:
        config = restore(config, defaults_of("train"), run.path)
    if is_rank_zero():
        managed = {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys()
        run.claim(120 if managed else 0)  # a file server may keep the lock of a dead machine for a while
    if config.get("reproduce"):
        config = recorded_config(config, defaults_of("train"), run.path)
    elif not config.resume and run.last.is_file():
        settle_auto(config)  # as in the recorded config, with which it is compared
        config = continue_restarted(config, run)
    config.trainer = given_processes(config.trainer)
    check_devices(config.trainer)
    settle_auto(config)
    return config


def _fit(
    trainer: L.Trainer,
    module: ImageClassifier,
    data: ImageDataModule,
    checkpoint: Path | None,
    run: RunDirectory,
    checkpointed: bool,
) -> None:
    """Train, and handle a stop signal, a lack of memory, a lost process and an early Ctrl-C."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stopped:
        log.info("%s in epoch %d, saved; resume=%s continues", stopped, trainer.current_epoch + 1, run.path)
        sys.exit(stopped.status(trainer))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(trainer, module, data.batch_size, checkpointed) from error
        if lost := lost_process(error, run.path):
            raise lost from error
        raise
    except SystemExit:  # Lightning exits like this after Ctrl-C before the first step
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def _log_settings(
    config: DictConfig, module: ImageClassifier, data: ImageDataModule, trainer: L.Trainer, run: RunDirectory
) -> None:
    """Log the main settings, above all the learning rate and the effective batch size."""
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    name, (height, width) = model_name(config.model), data.input.size
    log.info("run directory %s", run.path)
    log.info("%s, %.2f M parameters, %d x %d px, %d classes", name, parameters / 1e6, height, width, data.num_classes)
    describe = getattr(data.source, "describe", None)
    if stored := describe() if describe else "":
        log.info("data: %s", stored)
    if module.optimizer is not None:
        log.info("%s", module.optimizer.describe(batch))
    log.info("%d x %s, precision %s", trainer.world_size, trainer.accelerator.name(), config.trainer.precision)
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    made_for = cfg.input_size[-1] if cfg else 0
    if getattr(data.source, "is_demo", False) and made_for >= 2 * max(height, width):
        log.warning(
            "%s is designed for images of %d pixels, but the built-in digits have %d: this run only checks that"
            " everything works. For real data, set data=imagenet data.root=/data/imagenet, or VITRAIL_DATASET and"
            " VITRAIL_IMAGENET in .env.",
            name,
            made_for,
            max(height, width),
        )


def _summarise(csv_log: MetricsCSV, trainer: L.Trainer, seconds: float, run: RunDirectory) -> dict[str, Any]:
    """Return the best accuracies over all epochs, speed, duration and the last metrics."""
    rows = csv_log.rows.values()
    speeds = [row["speed/images_per_second"] for row in rows if "speed/images_per_second" in row]
    skipped = run.path / "skipped.txt"
    names = ("val/top1", "val/top5", "val/mIoU", "val/mAcc", "val/aAcc")
    metrics = [metric for name in names for metric in (name, f"{name}_ema")]
    if any(_HELD_OUT in row for row in rows):  # the validation images choose neither the epoch nor the learning rate
        best = {metric: csv_log.best(metric, by=_HELD_OUT) for metric in (*metrics, _HELD_OUT, "held_out/lr")}
    else:
        best = {metric: csv_log.best(metric) for metric in metrics}
    return {
        **{metric: value for metric, value in best.items() if value is not None},
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 1),
        "images_per_second": round(statistics.median(speeds), 1) if speeds else 0.0,
        "skipped_images": len(set(skipped.read_text(encoding="utf-8").splitlines())) if skipped.is_file() else 0,
        "last": _floats(trainer.callback_metrics),
    }


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
