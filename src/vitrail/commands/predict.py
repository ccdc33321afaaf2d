"""Predict the classes, or the masks, of the images in a file, folder or list."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vitrail.data.label_maps import LabelMapStore
from vitrail.errors import ConfigError
from vitrail.models.explanations import Explanation, check_kinds, explain
from vitrail.reporting.class_grids import annotation_grid, covered_box
from vitrail.reporting.explanations import Annotation, explanation_sheet
from vitrail.reporting.pictures import denormalise
from vitrail.reporting.predictions import above, check_format, picture_names, prediction_picture, prediction_writer
from vitrail.reporting.segmentation import mask_image, mask_picture, share_writer
from vitrail.reporting.tables import counted, near
from vitrail.runs.config import named_keys, plain
from vitrail.runs.images import find_images, open_image
from vitrail.runs.keys import check_choices, check_keys
from vitrail.runs.logs import set_up_logging
from vitrail.runs.masks import PredictedMask, check_options, mask_predictions
from vitrail.runs.outputs import predicts_masks
from vitrail.runs.prediction import DTYPES, Prediction, predictions
from vitrail.runs.trained import load_run
from vitrail.runs.trained_model import TrainedModel
from vitrail_runtime.names import readable

log = logging.getLogger(__name__)

Result = TypeVar("Result", Prediction, PredictedMask)

_SHOWN = 5  # unreadable images that the terminal lists


def predict(config: DictConfig) -> bool:
    """Write the predictions that `config` describes, and return whether all images could be read.

    Raises:
        ConfigError: a setting is invalid, or no image can be read.
    """
    set_up_logging()
    check_keys(config, "predict")
    check_choices(config, {"precision": tuple(DTYPES), "weights": ("best", "ema", "raw")})
    out = Path(config.out).expanduser()
    check_format(out)
    kinds = [config.explain] if isinstance(config.explain, str) else [*(config.explain or ())]
    if kinds and config.overlay is None:
        raise ConfigError(f"explain={','.join(kinds)}: set overlay=<folder> to write the pictures to.")
    images = find_images(config.images)
    overlay = _folder(config, "overlay", images)
    model = None if config.model is None else plain(config.model)
    trained = load_run(config.ckpt, config.weights, model, image_size=config.image_size)
    log.info("%s, %s weights: %s", trained.name, trained.weights, counted(len(images), "image"))
    if predicts_masks(trained.model):
        check_options(named_keys())
        log.info("%s", trained.inference.describe())
        unreadable = _write_masks(config, trained, images, out, overlay)
    else:
        if "masks" in named_keys():
            raise ConfigError(f"masks={config.masks}: ckpt={config.ckpt} is a classifier; omit masks.")
        explainer = Explainer(trained, kinds) if kinds else None
        unreadable = _write_classes(config, trained, images, out, overlay, explainer)
    skipped = out.with_name(f"{out.stem}_skipped.txt")
    skipped.unlink(missing_ok=True)
    log.info("%s: %d predictions", near(out), len(images) - len(unreadable))
    if unreadable:
        skipped.write_text("".join(f"{line}\n" for line in unreadable), encoding="utf-8")
        for line in unreadable[:_SHOWN]:
            log.warning("%s", line)
        log.error("%d of %d images skipped, listed in %s", len(unreadable), len(images), near(skipped))
    return not unreadable


def _folder(config: DictConfig, key: str, images: Sequence[str]) -> Path | None:
    """Return the folder that a key names; None if it is not set.

    Raises:
        ConfigError: it contains some of the images, which could be overwritten.
    """
    if config[key] is None:
        return None
    folder = Path(config[key]).expanduser().absolute()
    if any(Path(image).absolute().is_relative_to(folder) for image in images):
        raise ConfigError(f"{key}={config[key]}: contains some of the images; choose another folder.")
    return folder


class Explained(NamedTuple):
    """What explains the prediction of one image."""

    pixels: NDArray[np.uint8]
    """The network's input (1, H, W, 3), uint8."""
    maps: Explanation
    """Its maps, as a batch of one."""


class Explainer:
    """Maps that explain predictions, and their pictures.

    Args:
        trained: the network, and the label maps that it was trained with.
        kinds: maps to draw, see `vitrail.models.explanations.explain`.

    Raises:
        ConfigError: a kind is unknown, or the network cannot give it.
    """

    def __init__(self, trained: TrainedModel, kinds: Sequence[str]) -> None:
        check_kinds(trained.model, kinds, trained.input.size)
        self.trained, self.kinds = trained, kinds
        data = trained.config.get("data") or {}
        where = data.get("label_maps") if "tokens" in kinds else None
        self.label_maps = LabelMapStore.open(where) if where and Path(where).is_dir() else None
        self.root = Path(str(data.get("root"))).expanduser().resolve()
        if where and self.label_maps is None:
            log.warning("data.label_maps=%s: no such folder; the pictures show no label maps", where)

    def __call__(self, images: Tensor, classes: Tensor) -> list[Explained]:
        """Return what explains the classes (B) that are predicted for normalised images (B, 3, H, W)."""
        found = explain(self.trained.model, images, self.kinds, classes)
        pixels = denormalise(images, self.trained.input.mean, self.trained.input.std)
        return [Explained(pixels[index : index + 1], found.of(index)) for index in range(len(images))]

    def picture(self, path: str, whole: Image.Image, found: Explained) -> Image.Image:
        """Draw the maps of an image, whose file is at `path`; with its label map if the training had one of it."""
        annotation = None
        if self.label_maps is not None and (key := _key_in(self.label_maps, self.root, path)) is not None:
            grid = annotation_grid(self.label_maps, key)
            annotation = Annotation(whole, grid, covered_box(self.label_maps, whole))
        return explanation_sheet(found.pixels, found.maps, self.trained.class_names, [annotation])


def _key_in(store: LabelMapStore, root: Path, path: str) -> str | None:
    """Return the key of an image in a store of label maps; None if the image is not of the annotated split in `root`.

    Images of other splits may have the same names.
    """
    file = Path(path).resolve()
    if not file.is_relative_to(root):
        return None
    parts = PurePath(readable(str(file.relative_to(root)))).with_suffix("").parts
    split = store.about.get("split", "train")
    key = "/".join(parts[parts.index(split) + 1 :]) if split in parts else ""
    return key if key in store else None


def _write_classes(
    config: DictConfig,
    trained: TrainedModel,
    images: list[str],
    out: Path,
    overlay: Path | None,
    explainer: Explainer | None,
) -> list[str]:
    """Write the most likely classes and the pictures, and return why images could not be read."""
    unreadable: list[str] = []
    top_k = min(config.top_k, trained.num_classes)
    results = predictions(
        trained.model,
        trained.input,
        trained.class_names,
        images,
        top_k=top_k,
        batch_size=config.batch_size,
        explain=explainer,
        **_loading(config),
    )
    with prediction_writer(out, top_k) as write:
        for result, name in _readable(results, images, config.images, unreadable):
            write(result.image, result.classes, result.probabilities)
            if overlay is None:
                continue
            image = open_image(result.image, result.image, trained.input.value_range)
            picture = prediction_picture(image, result.classes, result.probabilities)
            if explainer is not None:
                picture = above(picture, explainer.picture(result.image, image, result.explanation))
            _save(picture, overlay / f"{name}.jpg", "overlay")
    return unreadable


def _write_masks(
    config: DictConfig, trained: TrainedModel, images: list[str], out: Path, overlay: Path | None
) -> list[str]:
    """Write the masks, the share of each class and the pictures, and return why images could not be read."""
    unreadable: list[str] = []
    masks, names = _folder(config, "masks", images), trained.class_names
    results = mask_predictions(
        trained.model, trained.input, trained.inference, trained.num_classes, images, **_loading(config)
    )
    with share_writer(out, names) as write:
        for result, name in _readable(results, images, config.images, unreadable):
            write(result.image, "" if masks is None else f"{name}.png", result.shares)
            if masks is not None:
                _save(mask_image(result.mask), masks / f"{name}.png", "masks")
            if overlay is not None:
                image = open_image(result.image, result.image, trained.input.value_range)
                _save(mask_picture(image, result.mask, names), overlay / f"{name}.jpg", "overlay")
    if masks is not None:
        log.info("%s: masks, whose values are the indices of the classes", near(masks))
    return unreadable


def _loading(config: DictConfig) -> dict[str, Any]:
    return {"num_workers": config.num_workers, "device": config.device, "precision": config.precision}


def _readable(
    results: Iterator[Result], images: Sequence[str], where: str, unreadable: list[str]
) -> Iterator[tuple[Result, str]]:
    """Yield the results of the images that can be read, each with its name of `picture_names`; show the progress.

    Args:
        results: result of each image.
        images: paths of the images.
        where: value of `images`, for messages.
        unreadable: gets the reason for each of the others.

    Raises:
        ConfigError: no image can be read.
    """
    for result, name in zip(_with_progress(results, len(images)), picture_names(images), strict=True):
        if result.problem:
            unreadable.append(result.problem)
        else:
            yield result, name
    if len(unreadable) == len(images):
        raise ConfigError(f"images={where}: no image can be read; the first: {unreadable[0]}")


def _save(picture: Image.Image, path: Path, key: str) -> None:
    """Save a picture, and create its folder.

    Raises:
        ConfigError: it cannot be written; the message names `key`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)  # of a JPEG
    except OSError as error:
        raise ConfigError(f"{key}: cannot write {path} ({error.strerror or error}).") from error


def _with_progress(results: Iterator[Result], total: int) -> Iterator[Result]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress("predicting", *columns, console=get_console(), transient=True) as progress:
        yield from progress.track(results, total=total)
