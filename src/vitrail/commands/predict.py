"""Predict the classes of the images in a file, folder or list."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

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
from vitrail.reporting.predictions import above, check_format, overlay_names, prediction_picture, prediction_writer
from vitrail.reporting.tables import near
from vitrail.runs.config import check_choices, check_keys, plain
from vitrail.runs.images import find_images, open_image
from vitrail.runs.logs import set_up_logging
from vitrail.runs.prediction import DTYPES, Prediction, predictions, require_classifier
from vitrail.runs.trained import TrainedModel, load_run
from vitrail_runtime.names import readable

log = logging.getLogger(__name__)

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
    overlay = None if config.overlay is None else Path(config.overlay).expanduser().absolute()
    if overlay and any(Path(image).absolute().is_relative_to(overlay) for image in images):
        raise ConfigError(f"overlay={config.overlay}: contains some of the images; choose another folder.")
    model = None if config.model is None else plain(config.model)
    trained = load_run(config.ckpt, config.weights, model, image_size=config.image_size)
    require_classifier(trained.model, f"ckpt={config.ckpt}")
    explainer = Explainer(trained, kinds) if kinds else None
    log.info("%s, %s weights: %d images", trained.name, trained.weights, len(images))
    unreadable = _write(config, trained, images, out, overlay, explainer)
    skipped = out.with_name(f"{out.stem}_skipped.txt")
    skipped.unlink(missing_ok=True)
    log.info("%s: %d predictions", near(out), len(images) - len(unreadable))
    if unreadable:
        skipped.write_text("".join(f"{line}\n" for line in unreadable), encoding="utf-8")
        for line in unreadable[:_SHOWN]:
            log.warning("%s", line)
        log.error("%d of %d images skipped, listed in %s", len(unreadable), len(images), near(skipped))
    return not unreadable


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
        where = (trained.config.get("data") or {}).get("label_maps") if "tokens" in kinds else None
        self.label_maps = LabelMapStore.open(where) if where and Path(where).is_dir() else None
        if where and self.label_maps is None:
            log.warning("data.label_maps=%s: no such folder; the pictures show no label maps", where)

    def __call__(self, images: Tensor, classes: Tensor) -> list[Explained]:
        """Return what explains the classes (B) that are predicted for normalised images (B, 3, H, W)."""
        found = explain(self.trained.model, images, self.kinds, classes)
        pixels = denormalise(images, self.trained.input.mean, self.trained.input.std)
        return [Explained(pixels[index : index + 1], found.of(index)) for index in range(len(images))]

    def picture(self, path: str, whole: Image.Image, found: Explained) -> Image.Image:
        """Draw the maps of an image, whose file is at `path`; with its label map if the training had one."""
        annotation = None
        if self.label_maps is not None and (key := _key_in(self.label_maps, path)) is not None:
            grid = annotation_grid(self.label_maps, key)
            annotation = Annotation(whole, grid, covered_box(self.label_maps, whole))
        return explanation_sheet(found.pixels, found.maps, self.trained.class_names, [annotation])


def _key_in(store: LabelMapStore, path: str) -> str | None:
    """Return the key of an image in a store of label maps: the end of its path without extension; None if absent."""
    parts = PurePath(readable(path)).with_suffix("").parts
    keys = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((key for key in keys if key in store), None)


def _write(
    config: DictConfig,
    trained: TrainedModel,
    images: list[str],
    out: Path,
    overlay: Path | None,
    explainer: Explainer | None,
) -> list[str]:
    """Write the predictions and pictures, and return why images could not be read."""
    unreadable: list[str] = []
    top_k = min(config.top_k, trained.num_classes)
    targets = iter(()) if overlay is None else (overlay / name for name in overlay_names(images))
    results = predictions(
        trained.model,
        trained.input,
        trained.class_names,
        images,
        top_k=top_k,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=config.device,
        precision=config.precision,
        explain=explainer,
    )
    with prediction_writer(out, top_k) as write:
        for result in _with_progress(results, len(images)):
            target = next(targets, None)
            if result.problem:
                unreadable.append(result.problem)
                continue
            write(result.image, result.classes, result.probabilities)
            if target is not None:
                _draw(trained, result, target, explainer)
        if len(unreadable) == len(images):
            raise ConfigError(f"images={config.images}: no image can be read; the first: {unreadable[0]}")
    return unreadable


def _draw(trained: TrainedModel, result: Prediction, path: Path, explainer: Explainer | None) -> None:
    """Write the picture of a prediction, and below it what explains the prediction.

    Raises:
        ConfigError: it cannot be written.
    """
    image = open_image(result.image, result.image, trained.input.value_range)
    picture = prediction_picture(image, result.classes, result.probabilities)
    if explainer is not None:
        picture = above(picture, explainer.picture(result.image, image, result.explanation))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    except OSError as error:
        raise ConfigError(f"overlay: cannot write {path} ({error.strerror or error}).") from error


def _with_progress(results: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress("predicting", *columns, console=get_console(), transient=True) as progress:
        yield from progress.track(results, total=total)
