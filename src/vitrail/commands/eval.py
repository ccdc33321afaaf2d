"""Evaluate a trained network on its validation images or on other images."""

import logging
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import nn

from vitrail.checkpoints.classes import require_same
from vitrail.checkpoints.fitting import load_checkpoint
from vitrail.data import ImageDataModule
from vitrail.errors import ConfigError
from vitrail.objectives import SegmentationLoss
from vitrail.reporting import Evaluation, confused_pairs, evaluation_figure, evaluation_report
from vitrail.reporting.segmentation import MaskWriter, segmentation_report, write_class_scores
from vitrail.reporting.tables import near
from vitrail.reporting.wandb_dashboard import show_evaluation
from vitrail.runs.assembly import check_devices
from vitrail.runs.config import instantiate, named_keys, output_directory, plain, rebase
from vitrail.runs.directory import RunDirectory, is_rank_zero
from vitrail.runs.keys import check_choices, check_keys
from vitrail.runs.loggers import continue_loggers, log_results
from vitrail.runs.logs import set_up_logging
from vitrail.runs.outputs import check_task, predicts_masks
from vitrail.runs.segmentation import SEGMENTERS, build_inference
from vitrail.runs.trained import load_run
from vitrail.runs.trained_model import TrainedModel
from vitrail.training.predictions import Predictions, Predictor
from vitrail.training.segmentation import SegmentationScores, SemanticSegmenter
from vitrail_runtime.allowed_targets import resolve_target
from vitrail_runtime.secrets import redacted

log = logging.getLogger(__name__)

_CHOICES = {"weights": ("both", "raw", "ema"), "among": ("data", "all")}
_INPUT = (
    "image_size",
    "mean",
    "std",
    "value_range",
)  # keys of `data` that come from the network unless the user sets them


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Run the evaluation that `config` describes, and write and print its results.

    Returns:
        Number of images, loss, accuracies and calibration error for each set of weights (`raw`, `ema`).

    Raises:
        ConfigError: a setting is invalid, or the checkpoint does not fit the model or the data.
    """
    set_up_logging()
    check_keys(config, "eval")
    check_choices(config, _CHOICES)
    check_devices(config.trainer)
    trained = open_trained(config)
    chosen_sets = [name for name in trained.weight_sets if config.weights in ("both", name)]
    data = build_data(config, trained)
    if "masks" in data.provides:
        return _evaluate_segmentation(config, trained, data, chosen_sets)
    classes = _class_names(trained, data)
    chosen, among = match_classes(data.classes, classes, config.among)
    trainer = _build_trainer(config)
    evaluations: dict[str, Evaluation] = {}
    run = RunDirectory(output_directory())
    _record(run, config, trained)
    loggers = _continued_loggers(config, trained, run)
    title = _title(trained)
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
        if (pairs := confused_pairs(evaluation, classes, predictions, data.val.split)) is not None:
            pairs.save(run.path / f"confusions_{name}.png")
    results = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    if trainer.is_global_zero:
        run.write_results(results)
        _log(loggers, results)
        get_console().print(evaluation_report(evaluations, classes, title))
        log.info("CSV files of classes, confusions and images, and a figure, are in %s", run.path)
    return results


def _build_trainer(config: DictConfig) -> L.Trainer:
    return instantiate(config.trainer, "trainer", strategy=instantiate(config.strategy, "strategy"), logger=False)


def _record(run: RunDirectory, config: DictConfig, trained: TrainedModel) -> None:
    """Write the evaluation's config, with the checkpoint that was found."""
    if is_rank_zero():
        found = None if trained.path is None else str(trained.path)  # not the run directory, which is named as given
        run.record(redacted({**plain(config), "ckpt": found}), redacted(list(HydraConfig.get().overrides.task)))


def _continued_loggers(config: DictConfig, trained: TrainedModel, run: RunDirectory) -> list[Any]:
    """Build the first process's loggers, before the evaluation: they continue the training's run, or are its own."""
    if not is_rank_zero():
        return []
    folder = run.path
    if trained.is_run and trained.path is not None and (trained.path.parents[1] / "config.yaml").is_file():
        folder = trained.path.parents[1]
    return continue_loggers(config.logger, folder)


def _log(loggers: list[Any], results: dict[str, dict[str, Any]]) -> None:
    """Log results; W&B's workspace gets panels of them."""
    show_evaluation(loggers, log_results(loggers, _data_name(), results))


def _data_name() -> str:
    """Return the name of the data that the command line chooses; `val` for the training's own."""
    return HydraConfig.get().runtime.choices.get("data") or "val"


def _title(trained: TrainedModel) -> str:
    return f"{trained.name}, {near(trained.path) if trained.path else 'published weights'}"


def _evaluate_segmentation(
    config: DictConfig, trained: TrainedModel, data: Any, chosen_sets: list[str]
) -> dict[str, dict[str, Any]]:
    """Evaluate a segmentation network; write and print mIoU, mAcc, aAcc and the IoU of each class.

    Raises:
        ConfigError: the data's classes are not the network's.
    """
    classes = _class_names(trained, data)
    require_same(classes, data.classes, f"ckpt={trained.path}", "evaluate with data of the same classes")
    inference = build_inference(data, trained.model)
    trainer, run = _build_trainer(config), RunDirectory(output_directory())
    _record(run, config, trained)
    loggers = _continued_loggers(config, trained, run)
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, SegmentationScores] = {}
    for name in chosen_sets:
        if trained.path is not None:
            load_checkpoint(trained.model, trained.path, ema=name == "ema", same_classes=True)
        writer = MaskWriter(run.path / f"masks_{name}", len(classes)) if config.masks else None
        module = SemanticSegmenter(trained.model, SegmentationLoss(), len(classes), inference, writer)
        trainer.validate(module, datamodule=data, verbose=False)
        scores[name] = module.val_metrics.latest
        summary = {key: float(value) for key, value in scores[name].summary().items()}
        results[name] = {**summary, "images": module.val_metrics.images, "inference": inference.describe()}
        if trainer.is_global_zero:
            write_class_scores(scores[name], classes, run.path / f"classes_{name}.csv")
    if trainer.is_global_zero:
        run.write_results(results)
        _log(loggers, results)
        get_console().print(segmentation_report(results, scores, classes, _title(trained)))
        log.info("a CSV file of the classes is in %s", run.path)
    return results


def _class_names(trained: TrainedModel, data: ImageDataModule) -> list[str]:
    """Return the network's class names; the data's if they are not recorded and the number of classes is the same."""
    known = trained.classes
    if known is not None and (trained.classes_recorded or set(data.classes) <= set(known)):
        return known
    if trained.num_classes != data.num_classes:
        raise ConfigError(
            f"ckpt={trained.path}: has {trained.num_classes} classes, but the data has {data.num_classes}."
        )
    log.info("%s contains no class names; assuming the data's classes in the data's order", trained.path)
    return data.classes


def open_trained(config: DictConfig) -> TrainedModel:
    """Open the network, built for `data.image_size` if the command line sets it.

    Raises:
        ConfigError: the network cannot be opened, or it is not from a run and no data is set.
    """
    size = None if config.data is None else config.data.get("image_size")
    named = size is not None and "data.image_size" in named_keys()
    model = None if config.model is None else plain(config.model)
    weights: Any = "best" if config.weights == "both" else config.weights
    if model is not None and model.get("_target_") in SEGMENTERS:  # the data says for which size they were trained
        named = size is not None
    trained = load_run(config.ckpt, weights, model, image_size=size if named else None)
    if not trained.is_run and (config.data is None or "_target_" not in config.data):
        raise ConfigError("data: not set; choose data=imagenet, imagenet_v2, imagefolder, ... with data.root=...")
    return trained


def build_data(config: DictConfig, trained: TrainedModel) -> ImageDataModule:
    """Build the validation data with the network's input settings and the command line's `data` and `augment`.

    `data` and `augment` can be whole groups or single keys. Image size and normalisation are the network's unless the
    command line sets them.
    """
    spec = trained.input
    fed = {"image_size": list(spec.size), "mean": list(spec.mean), "std": list(spec.std)}
    if spec.value_range is not None:
        fed["value_range"] = list(spec.value_range)
    data = {**trained.config.get("data", {}), **fed}
    augment = trained.config.get("augment") or {
        "_target_": "vitrail.data.Augmentation",
        "eval_interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    if config.data is not None:
        given = plain(config.data)
        if "_target_" in given:
            data = given | {key: fed[key] for key in _INPUT if key in fed and f"data.{key}" not in named_keys()}
        else:
            if "root" in given:
                rebase(data, given["root"])
            data |= given
    if config.augment is not None:
        given = plain(config.augment)
        augment = given if "_target_" in given else augment | given
    if "train_dir" in data.get("source", {}):
        data["source"]["train_dir"] = None  # training images are not needed
    if "value_range" in data.get("source", {}):
        data["source"]["value_range"] = data.get("value_range")
    if "skipped_file" in data:  # must not overwrite the training's file
        data["skipped_file"] = str(output_directory() / "skipped.txt")
    check_task(trained.model, getattr(resolve_target(str(data["_target_"])), "has_masks", False))
    if predicts_masks(trained.model) and not trained.is_run:  # evaluation does not augment
        return instantiate(OmegaConf.create(data), "data", augment=None)
    augmentation = instantiate(OmegaConf.create(augment), "augment")
    return instantiate(OmegaConf.create(data), "data", augment=augmentation)


def match_classes(data: list[str], network: list[str], among: str) -> tuple[list[int] | None, list[int] | None]:
    """Match the data's classes with the network's.

    Args:
        data: class names of the data.
        network: class names of the network.
        among: `data` restricts the predictions to the data's classes, `all` allows all of the network's.

    Returns:
        The network's class index of each class of the data (None if they are the same), and the classes that
        predictions are restricted to (None for all).

    Raises:
        ConfigError: the network does not have all classes of the data.
    """
    if data == network:
        return None, None
    if unknown := sorted(set(data) - set(network)):
        raise ConfigError(
            f"data: {len(unknown)} of its {len(data)} classes are not among the checkpoint's {len(network)} classes;"
            f" the first is {unknown[0]}."
        )
    chosen = [network.index(name) for name in data]
    if len(data) == len(network) or among == "all":
        return chosen, None
    log.info(
        "predictions are restricted to the data's %d of the network's %d classes; among=all allows all of them",
        len(data),
        len(network),
    )
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
    """Return the labels of each image as the network's class indices; None if images have one label each."""
    sets = getattr(data.val.split, "label_sets", None)
    if sets is None:
        return None
    index_of = range(data.num_classes) if chosen is None else chosen
    return {key: [index_of[label] for label in labels] for key, labels in zip(data.val.split.keys(), sets, strict=True)}
