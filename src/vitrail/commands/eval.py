"""Evaluate a trained network, on the images that it was validated on or on others."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import nn

from vitrail.checkpoints.reading import load_checkpoint
from vitrail.data import ImageDataModule
from vitrail.errors import ConfigError
from vitrail.reporting import Evaluation, evaluation_figure, evaluation_report
from vitrail.reporting.tables import near
from vitrail.runs.assembly import check_devices
from vitrail.runs.config import check_choices, check_keys, instantiate, plain
from vitrail.runs.directory import RunDirectory
from vitrail.runs.logs import set_up_logging
from vitrail.runs.trained import TrainedModel, load_run
from vitrail.training.predictions import Predictions, Predictor

log = logging.getLogger(__name__)

_CHOICES = {"weights": ("both", "raw", "ema"), "among": ("data", "all")}
_INPUT = ("image_size", "mean", "std")  # keys of `data` that belong to the network, unless the user names them


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Evaluate what `config` describes; returns image count, loss, accuracies and calibration error of each weights.

    Raises:
        ConfigError: a setting cannot work, or the checkpoint does not fit model or data.
    """
    set_up_logging()
    check_keys(config, "eval")
    check_choices(config, _CHOICES)
    check_devices(config.trainer)
    trained = open_trained(config)
    chosen_sets = [name for name in trained.weight_sets if config.weights in ("both", name)]
    data = build_data(config, trained)
    classes = _class_names(trained, data)
    chosen, among = match_classes(data.classes, classes, config.among)
    trainer: L.Trainer = instantiate(
        config.trainer, "trainer", strategy=instantiate(config.strategy, "strategy"), logger=False
    )
    evaluations: dict[str, Evaluation] = {}
    run = RunDirectory(HydraConfig.get().runtime.output_dir)
    title = f"{trained.name}, {near(trained.path) if trained.path else 'published weights'}"
    for name in chosen_sets:
        if trained.path is not None:
            load_checkpoint(trained.model, trained.path, ema=name == "ema", same_classes=True)
        predictions = _predict(trainer, trained.model, data, chosen, among)
        if not trainer.is_global_zero:
            continue
        evaluation = evaluations[name] = Evaluation.of(predictions, _label_sets(data, chosen))
        evaluation.write(run.path, name, classes, predictions)
        figure = evaluation_figure(evaluation, classes, f"{title}, {name} weights")
        figure.savefig(run.path / f"evaluation_{name}.png")
    results = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    if trainer.is_global_zero:
        run.write_results(results)
        get_console().print(evaluation_report(evaluations, classes, title))
        log.info("classes, confusions and images as CSV, and a picture, in %s", run.path)
    return results


def _class_names(trained: TrainedModel, data: ImageDataModule) -> list[str]:
    """Return the names of the network's classes; those of the data if nobody recorded them and the number fits."""
    recorded, count = trained.classes, trained.num_classes
    if recorded is not None and (trained.is_run or set(data.classes) <= set(recorded)):
        return recorded
    if count != data.num_classes:
        raise ConfigError(f"ckpt={trained.path}: knows {count} classes, not {data.num_classes}.")
    return data.classes


def open_trained(config: DictConfig) -> TrainedModel:
    """Open the network, built for the image size that the command line names, if it does.

    Raises:
        ConfigError: as `load_run`; or nothing says which images to evaluate somebody's weights on.
    """
    size = None if config.data is None else config.data.get("image_size")
    named = size is not None and _is_named("data.image_size")
    model = None if config.model is None else plain(config.model)
    weights = "best" if config.weights == "both" else config.weights
    trained = load_run(config.ckpt, weights, model, image_size=size if named else None)
    if not trained.is_run and (config.data is None or "_target_" not in config.data):
        raise ConfigError("data: not set; choose data=imagenet, imagenet_v2, imagefolder, ... with data.root=...")
    return trained


def _is_named(key: str) -> bool:
    """Whether the command line sets a key."""
    return key in {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}


def build_data(config: DictConfig, trained: TrainedModel) -> ImageDataModule:
    """Build the validation images, fed as the network was; with the `data` and `augment` of the command line.

    Each of both is a whole group or single keys. Image size and normalisation stay the network's unless they are named.
    """
    spec = trained.input
    fed = {"image_size": list(spec.size), "mean": list(spec.mean), "std": list(spec.std)}
    data = {**trained.config.get("data", {}), **fed}
    augment = {
        **trained.config.get("augment", {"_target_": "vitrail.data.Augmentation"}),
        "eval_interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    if config.data is not None:
        given = plain(config.data)
        if "_target_" in given:
            data = given | {key: fed[key] for key in _INPUT if not _is_named(f"data.{key}")}
        else:
            data |= given
    if config.augment is not None:
        given = plain(config.augment)
        augment = given if "_target_" in given else augment | given
    if "train_dir" in data.get("source", {}):
        data["source"]["train_dir"] = None  # nothing is trained on, so it need not be there
    if "skipped_file" in data:
        data["skipped_file"] = str(Path(HydraConfig.get().runtime.output_dir) / "skipped.txt")  # not the training's
    augmentation = instantiate(OmegaConf.create(augment), "augment")
    return instantiate(OmegaConf.create(data), "data", augment=augmentation)


def match_classes(data: list[str], network: list[str], among: str) -> tuple[list[int] | None, list[int] | None]:
    """The network's class of each class of the data, and those among which it is to choose; None for all of them.

    Raises:
        ConfigError: a class of the data is none of the network's.
    """
    if data == network:
        return None, None
    if unknown := sorted(set(data) - set(network)):
        raise ConfigError(
            f"data: its {len(data)} classes are not the {len(network)} that the checkpoint knows"
            f" ({len(unknown)} unknown, first {unknown[0]})."
        )
    chosen = [network.index(name) for name in data]
    if len(data) == len(network) or among == "all":
        return chosen, None
    log.info("the network chooses among the data's %d of its %d classes (among=all: all)", len(data), len(network))
    return chosen, chosen


def _predict(
    trainer: L.Trainer,
    model: nn.Module,
    data: ImageDataModule,
    chosen: list[int] | None,
    among: list[int] | None,
) -> Predictions:
    predictor = Predictor(model, chosen, among)
    trainer.validate(predictor, datamodule=data, verbose=False)
    return predictor.predictions


def _label_sets(data: ImageDataModule, chosen: list[int] | None) -> dict[str, list[int]] | None:
    """For data with several labels an image: those of each, as the network counts classes."""
    sets = getattr(data.val.split, "label_sets", None)
    if sets is None:
        return None
    own = range(data.num_classes) if chosen is None else chosen
    return {key: [own[label] for label in labels] for key, labels in zip(data.val.split.keys(), sets, strict=True)}
