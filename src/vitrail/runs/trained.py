"""Open any trained network: a run, an exported folder, or a weights file together with a model config."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
from omegaconf import OmegaConf
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

from vitrail.checkpoints.fitting import load_checkpoint
from vitrail.checkpoints.reading import backbone_weights, read_checkpoint, weight_sets
from vitrail.errors import ConfigError
from vitrail.models.licences import inherited_licence, licence_of
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.runs.assembly import build_model, model_name
from vitrail.runs.config import plain
from vitrail.runs.directory import find_weights_file
from vitrail.runs.prediction import require_classifier
from vitrail.runs.segmentation import SEGMENTERS
from vitrail.runs.trained_model import TrainedModel
from vitrail.types import ImageSize, InputSpec, height_width
from vitrail_runtime.checking import checked
from vitrail_runtime.renames import upgraded

log = logging.getLogger(__name__)

_SEGMENTED_SIDE = 512  # pixels; the window of the published segmentation networks


@checked
def load_run(
    path: str | Path | None,
    weights: Literal["best", "ema", "raw"] = "best",
    model: str | Mapping[str, Any] | None = None,
    image_size: ImageSize | None = None,
    key: str = "ckpt",
) -> TrainedModel:
    """Open a trained network of vitrail, timm or an official release.

    Args:
        path: run directory (its best checkpoint), checkpoint of a run, folder written by `export.py`, or any weights
            file; None downloads timm's weights of `model`.
        weights: `ema`, `raw`, or `best`, which means EMA weights if there are any.
        model: name in timm, or model config; only for weights files that do not contain one.
        image_size: image size to build the network for; None for the recorded size.
        key: config key of `path`, for error messages.

    Raises:
        ConfigError: the model is unknown, or the weights are missing or do not fit.
    """
    file, described = (None, None) if path is None else find_weights_file(path, key)
    if described is not None:
        _refuse_model(model, described["architecture"], file, "config.json")
        return _open_export(file, described, weights, image_size, key)
    checkpoint = {} if file is None or file.suffix == ".npz" else read_checkpoint(file, values=False, key=key)
    if "config" in checkpoint and "classes" in checkpoint:
        _refuse_model(model, model_name(upgraded(checkpoint["config"])["model"]), file, "the checkpoint")
        return _open_run(file, checkpoint, weights, image_size, key)
    if model is None:
        if file is None:
            raise ConfigError(
                f"{key}: not set; set it to a run, an exported folder or, with model=..., a weights file."
            )
        raise ConfigError(
            f"{key}={file}: contains no config, so it was not written by train.py; set model=..., for example"
            " model=t2t_vit_14."
        )
    node = {"name": model} if isinstance(model, str) else dict(model)
    node = {"_target_": "vitrail.models.create_model", **node}
    return _open_published(file, checkpoint, node, weights, image_size, key)


def _refuse_model(model: str | Mapping[str, Any] | None, own: str, file: Path | None, where: str) -> None:
    """Refuse a model config from the command line that is not the one that comes with the weights."""
    given = model if model is None or isinstance(model, str) else model_name(model)
    if given not in (None, own):
        raise ConfigError(f"model: {file} comes with its own model config ({own}, in {where}); omit model=...")


def _choose(sets: tuple[str, ...], weights: str, file: Path | None) -> str:
    """Return which weights to load.

    Raises:
        ConfigError: the file does not contain these weights.
    """
    chosen = sets[-1] if weights == "best" else weights
    if chosen not in sets:
        word = {"raw": "raw", "ema": "EMA"}[chosen]
        raise ConfigError(f"weights={weights}: {file} contains no {word} weights.")
    return chosen


def _open_run(
    file: Path | None, checkpoint: dict[str, Any], weights: str, image_size: ImageSize | None, key: str
) -> TrainedModel:
    config, classes = upgraded(checkpoint["config"]), list(checkpoint["classes"])
    sets = tuple(weight_sets(checkpoint))
    chosen = _choose(sets, weights, file)
    spec = _input_of(checkpoint, config, image_size)
    licence = inherited_licence(config)
    config["model"] = _as_trained(config["model"])
    model = build_model(config["model"], len(classes), spec.size)
    load_checkpoint(model, file or "", ema=chosen == "ema", same_classes=True, key=key)
    return TrainedModel(model.eval(), spec, classes, config, chosen, sets, file, licence=licence)


def _as_trained(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model config without the keys that the file of the weights decides."""
    decided = {"num_classes": None, "pretrained": False}
    return {key: decided.get(key, value) for key, value in node.items()}


def _input_of(checkpoint: dict[str, Any], config: dict[str, Any], image_size: ImageSize | None) -> InputSpec:
    """Return the input that a run's checkpoint records; checkpoints of vitrail 0.1 record it in their config only."""
    recorded = checkpoint.get("input")
    if recorded is None:
        data, augment = config["data"], config["augment"]
        recorded = {"size": data["image_size"], "mean": data["mean"], "std": data["std"]}
        names = {"interpolation": "eval_interpolation", "crop_pct": "crop_pct", "crop_mode": "crop_mode"}
        recorded |= {name: augment[key] for name, key in names.items() if key in augment}
    tuples = {"mean": tuple(recorded["mean"]), "std": tuple(recorded["std"])}
    if recorded.get("value_range"):
        tuples["value_range"] = tuple(recorded["value_range"])
    return InputSpec(**{**recorded, **tuples, "size": height_width(image_size or recorded["size"])})


def _open_export(
    file: Path | None, described: dict[str, Any], weights: str, image_size: ImageSize | None, key: str
) -> TrainedModel:
    chosen = _choose(("raw",), "best" if weights == "best" else weights, file)
    fed = described.get("pretrained_cfg", {})
    arguments = {name: value for name, value in described.get("model_args", {}).items() if name != "num_classes"}
    classes = described.get("label_names") or None
    count = described.get("num_classes") or fed.get("num_classes") or len(classes or ())
    sides = height_width(image_size or arguments.pop("img_size", None) or fed["input_size"][1:])
    arguments.pop("img_size", None)
    target = described.get("vitrail_target", "vitrail.models.create_model")
    node = {"_target_": target, "name": described["architecture"], **arguments}
    model = build_model(node, count, sides)
    load_checkpoint(model, file or "", same_classes=True, key=key)
    spec = InputSpec(
        sides,
        tuple(fed["mean"]),
        tuple(fed["std"]),
        fed.get("interpolation", "bicubic"),
        fed.get("crop_pct", 1.0),
        fed.get("crop_mode") or "center",
        tuple(described["value_range"]) if described.get("value_range") else None,
    )
    config = {"model": node, **{key: described[key] for key in ("inference",) if key in described}}
    return TrainedModel(model.eval(), spec, classes, config, chosen, ("raw",), file, licence=fed.get("license"))


def _open_published(
    file: Path | None,
    checkpoint: dict[str, Any],
    node: dict[str, Any],
    weights: str,
    image_size: ImageSize | None,
    key: str,
) -> TrainedModel:
    """Open a network of timm or of an official release; its input follows timm's configuration of the network."""
    if file is None and not node.get("pretrained"):
        raise ConfigError(f"{key}: not set; set it to a weights file, or download timm's with model.pretrained=true.")
    name = node.get("name")
    cfg = timm.get_pretrained_cfg(name) if name and timm.is_model(name) else None
    usual = _SEGMENTED_SIDE if node["_target_"] in SEGMENTERS else 224
    known = cfg.to_dict() if cfg else {"input_size": (3, usual, usual)}
    fed = resolve_data_config(pretrained_cfg=known, use_test_size=True)
    sides = height_width(image_size or fed["input_size"][1:])
    count = node.get("num_classes") or _classes_in(checkpoint, cfg) or (cfg.num_classes if cfg else 1000)
    if file is not None:
        node = _as_trained(node)
    sets = ("raw",) if not checkpoint else tuple(weight_sets(checkpoint))
    chosen = _choose(sets, weights, file)
    model = build_model({key: value for key, value in node.items() if key != "num_classes"}, count, sides)
    if file is not None:
        load_checkpoint(model, file, ema=chosen == "ema", same_classes=True, key=key)
    subset = infer_imagenet_subset({"num_classes": count})
    classes = ImageNetInfo(subset).label_names() if subset else None
    spec = InputSpec(
        sides, tuple(fed["mean"]), tuple(fed["std"]), fed["interpolation"], fed["crop_pct"], fed["crop_mode"]
    )
    return TrainedModel(
        *(model.eval(), spec, classes, {"model": node}, chosen, sets, file),
        classes_recorded=False,
        licence=licence_of(str(name)) if name else None,
    )


def _classes_in(checkpoint: dict[str, Any], cfg: Any) -> int | None:
    """Return the number of classes of the classifier in a checkpoint; None if it has no classifier by timm's name."""
    classifier = getattr(cfg, "classifier", None) or "head"
    for name in ("decode_head.conv_seg", classifier if isinstance(classifier, str) else classifier[0]):
        weights = backbone_weights(checkpoint, names=(f"{name}.weight", f"{name}.bias")) if checkpoint else {}
        if f"{name}.weight" in weights:
            return len(weights[f"{name}.weight"])
    return None


@checked
def run_classifier(
    ckpt: str,
    weights: Literal["best", "ema", "raw"] = "best",
    image_size: ImageSize | None = None,
    classes: Literal["data"] | None = None,
    key: str = "annotator",
    **kwargs: Any,
) -> PretrainedClassifier:
    """Open a network that vitrail trained or exported, to use it as an annotator or teacher.

    Args:
        ckpt: run directory, checkpoint, or exported folder.
        weights: `ema`, `raw` or `best`, as in `load_run`.
        image_size: pixels, or (height, width); None for the run's size.
        classes: `data`: its classes are the data's, in the same order, whatever their names.
        key: config key of the network, for error messages.
        kwargs: model arguments that override the run's (`output_stride`).

    Raises:
        ConfigError: the same errors as `load_run`.
    """
    opened = load_run(ckpt, weights, image_size=image_size, key=f"{key}.ckpt")
    require_classifier(opened.model, f"{key}.ckpt={ckpt}")
    if kwargs:
        node = plain(OmegaConf.merge(OmegaConf.create(opened.config["model"]), kwargs))
        model = build_model(node, len(opened.classes or ()), opened.input.size)
        load_checkpoint(model, opened.path or "", ema=opened.weights == "ema", same_classes=True)
    else:
        model = opened.model
    spec = opened.input
    names = None if classes == "data" else opened.classes
    return PretrainedClassifier(model, opened.name, spec.size, spec.mean, spec.std, spec.interpolation, names)
