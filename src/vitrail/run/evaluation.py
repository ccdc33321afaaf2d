"""The evaluation job: a run's checkpoint, its config, and the validation images."""

import logging
from typing import Any

import lightning as L
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import get_console

from vitrail.data import ImageDataModule
from vitrail.errors import ConfigError
from vitrail.insight import evaluation_table
from vitrail.models.checkpoints import backbone_weights, load_weights, read_checkpoint
from vitrail.objectives import CrossEntropy
from vitrail.run.config import check_keys, instantiate
from vitrail.run.directory import RunDirectory, find_checkpoint
from vitrail.run.training import build_model, check_devices, set_up_logging
from vitrail.training import ImageClassifier

log = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Validate the checkpoint `config.ckpt`; returns, for each set of weights, loss, top-1, top-5 and image count.

    Raises:
        ConfigError: the checkpoint is none of ours, or does not fit the data.
    """
    set_up_logging()
    check_keys(config, compose("eval"))
    if config.weights not in ("both", "raw", "ema"):
        raise ConfigError(f"weights={config.weights}: must be both, raw or ema.")
    path = find_checkpoint(config.ckpt)
    checkpoint = read_checkpoint(path)
    if "config" not in checkpoint:
        raise ConfigError(f"ckpt={path}: holds no config, so it was not written by vitrail's train.py.")
    run_config = with_overrides(checkpoint["config"], config)
    check_devices(config.trainer)
    data: ImageDataModule = instantiate(run_config.data, "data", augment=instantiate(run_config.augment, "augment"))
    if list(data.classes) != checkpoint["classes"]:
        raise ConfigError(
            f"data: its {data.num_classes} classes are not the {len(checkpoint['classes'])} that the checkpoint knows."
        )
    run_config.model.pretrained = False
    model = build_model(run_config, data)
    trainer: L.Trainer = instantiate(
        config.trainer, "trainer", strategy=instantiate(config.strategy, "strategy"), logger=False
    )
    averaged = "current_model_state" in checkpoint
    if config.weights == "ema" and not averaged:
        raise ConfigError(f"weights=ema: {path} holds no averaged weights.")
    results = {}
    for name in ("raw", "ema"):
        if config.weights in ("both", name) and (name == "raw" or averaged):
            load_weights(model, backbone_weights(checkpoint, ema=name == "ema"), source=str(path))
            results[name] = _validate(trainer, model, data)
    if trainer.is_global_zero:
        get_console().print(evaluation_table(results, f"{run_config.model.name}, {path}"))
        RunDirectory(HydraConfig.get().runtime.output_dir).write_results(results)
    return results


def _validate(trainer: L.Trainer, model: Any, data: ImageDataModule) -> dict[str, float]:
    module = ImageClassifier(model, CrossEntropy(), data.num_classes)
    values = trainer.validate(module, datamodule=data, verbose=False)[0]
    return {"images": len(data.val), **{name.removeprefix("val/"): value for name, value in values.items()}}


def with_overrides(saved: dict[str, Any], config: DictConfig) -> DictConfig:
    """The run's config with the `data` and `augment` of the command line: a whole group, or single keys of it."""
    result = OmegaConf.create(saved)
    assert isinstance(result, DictConfig)
    for group in ("data", "augment"):
        if (chosen := config[group]) is not None:
            result[group] = chosen if "_target_" in chosen else OmegaConf.merge(result[group], chosen)
    return result
