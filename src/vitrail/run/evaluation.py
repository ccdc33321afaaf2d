"""The evaluation job: a run's checkpoint or anybody's weights, on its own images or others."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import timm
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn

from vitrail.data import Augmentation, ImageDataModule
from vitrail.errors import ConfigError
from vitrail.insight import Evaluation, evaluation_picture, evaluation_report
from vitrail.insight.tables import near
from vitrail.models.checkpoints import load_checkpoint, read_checkpoint, weight_sets
from vitrail.run.config import check_choices, check_keys, instantiate, plain
from vitrail.run.directory import RunDirectory, find_checkpoint
from vitrail.run.training import check_devices, set_up_logging
from vitrail.training.predictions import Predictions, Predictor

log = logging.getLogger(__name__)

_CHOICES = {"weights": ("both", "raw", "ema"), "among": ("data", "all")}
_WORDS = {"raw": "raw", "ema": "averaged"}
_INPUT = ("image_size", "mean", "std")  # keys of `data` that belong to the network: its own unless the user says else


class Subject(NamedTuple):
    """What is evaluated: plain configs of the network and of what it was trained on, and what is known of both."""

    model: dict[str, Any]
    data: dict[str, Any]  # of a published network only what belongs to it
    augment: dict[str, Any]
    classes: list[str] | None  # None: not known yet
    weights: list[str]  # raw, ema


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Evaluate what `config` describes; returns image count, loss, accuracies and calibration error of each weights.

    Raises:
        ConfigError: a setting cannot work, or the checkpoint does not fit model or data.
    """
    set_up_logging()
    check_keys(config, compose("eval"))
    check_choices(config, _CHOICES)
    check_devices(config.trainer)
    path = find_checkpoint(config.ckpt) if config.ckpt else None
    subject = open_run(config, path) or open_published(config, path)
    chosen_sets = [name for name in subject.weights if config.weights in ("both", name)]
    if not chosen_sets:
        raise ConfigError(f"weights={config.weights}: {path} holds no {_WORDS[config.weights]} weights.")
    data = build_data(config, subject)
    classes = subject.classes or _published_classes(subject, data)
    chosen, among = match_classes(data.classes, classes, config.among)
    model = instantiate(subject.model, "model", num_classes=len(classes), img_size=data.pixels.size)
    trainer: L.Trainer = instantiate(
        config.trainer, "trainer", strategy=instantiate(config.strategy, "strategy"), logger=False
    )
    evaluations: dict[str, Evaluation] = {}
    run = RunDirectory(HydraConfig.get().runtime.output_dir)
    title = f"{subject.model['name']}, {near(path) if path else 'published weights'}"
    for name in chosen_sets:
        if path is not None:
            load_checkpoint(model, path, ema=name == "ema", same_classes=True)
        predictions = _predict(trainer, model, data, chosen, among)
        if not trainer.is_global_zero:
            continue
        evaluation = evaluations[name] = Evaluation.of(predictions, _label_sets(data, chosen))
        evaluation.write(run.path, name, classes, predictions)
        evaluation_picture(evaluation, classes, f"{title}, {name} weights").save(run.path / f"evaluation_{name}.png")
    results = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    if trainer.is_global_zero:
        run.write_results(results)
        get_console().print(evaluation_report(evaluations, classes, title))
        log.info("classes, confusions and images as CSV, and a picture, in %s", run.path)
    return results


def open_run(config: DictConfig, path: Path | None) -> Subject | None:
    """What vitrail trained; None for other checkpoints.

    Raises:
        ConfigError: `model` is given, which the run says already.
    """
    if path is None or path.suffix == ".npz":
        return None
    checkpoint = read_checkpoint(path)
    if "config" not in checkpoint or "classes" not in checkpoint:
        return None
    if config.model is not None:
        raise ConfigError(f"model: {path} is of a run, which says itself what its model is; leave model=... away.")
    saved = checkpoint["config"]
    model = {**saved["model"], "pretrained": False, "num_classes": None}
    return Subject(model, saved["data"], saved["augment"], checkpoint["classes"], weight_sets(checkpoint))


def open_published(config: DictConfig, path: Path | None) -> Subject:
    """A network of timm or of an official release, fed as timm's configuration of it says.

    Raises:
        ConfigError: nothing says which network or which weights, or on which images.
    """
    if config.model is None:
        missing = (
            f"ckpt={path}: holds no config, so it was not written by vitrail's train.py" if path else "ckpt: not set"
        )
        raise ConfigError(f"{missing}; model=... says which network it is of, such as model=t2t_vit_14.")
    if path is None and not config.model.pretrained:
        raise ConfigError("ckpt: not set; give a file of weights, or model.pretrained=true to download timm's.")
    if config.data is None or "_target_" not in config.data:
        raise ConfigError("data: not set; choose data=imagenet, imagenet_v2, imagefolder, ... with data.root=...")
    model = plain(config.model)
    cfg = timm.get_pretrained_cfg(model["name"]) if timm.is_model(model["name"]) else None
    fed = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else {}, use_test_size=True)
    _, height, width = fed["input_size"]
    if path is None:
        weights = ["raw"]
    else:
        model["pretrained"] = False
        weights = ["raw"] if path.suffix == ".npz" else weight_sets(read_checkpoint(path))
    return Subject(
        model,
        {"image_size": height if height == width else [height, width], "mean": fed["mean"], "std": fed["std"]},
        {
            "_target_": "vitrail.data.Augmentation",
            "crop_pct": fed["crop_pct"],
            "crop_mode": fed["crop_mode"],
            "eval_interpolation": fed["interpolation"],
        },
        None,
        weights,
    )


def build_data(config: DictConfig, subject: Subject) -> ImageDataModule:
    """The validation images, fed as the network was; with the `data` and `augment` of the command line.

    Each of both is a whole group or single keys. Image size and normalisation stay the network's unless they are named.
    """
    data, augment = dict(subject.data), dict(subject.augment)
    named = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    if config.data is not None:
        given = plain(config.data)
        if "_target_" in given:
            given |= {key: data[key] for key in _INPUT if key in data and f"data.{key}" not in named}
            data = given
        else:
            data |= given
    if config.augment is not None:
        given = plain(config.augment)
        augment = given if "_target_" in given else augment | given
    if "train_dir" in data:
        data["train_dir"] = None  # nothing is trained on, so it need not be there
    if "skipped_file" in data:
        data["skipped_file"] = str(Path(HydraConfig.get().runtime.output_dir) / "skipped.txt")  # not the training's
    augmentation: Augmentation = instantiate(OmegaConf.create(augment), "augment")
    return instantiate(OmegaConf.create(data), "data", augment=augmentation)


def _published_classes(subject: Subject, data: ImageDataModule) -> list[str]:
    """ImageNet's, by their number, where the data's are among them; else the data's own."""
    cfg = timm.get_pretrained_cfg(subject.model["name"])
    count = subject.model["num_classes"] or (cfg.num_classes if cfg else None)
    subset = infer_imagenet_subset({"num_classes": count})
    names = ImageNetInfo(subset).label_names() if subset else []
    return names if set(data.classes) <= set(names) else data.classes


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
