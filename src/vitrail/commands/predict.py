"""Predict the classes of the images in a file, folder or list."""

import logging
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vitrail.errors import ConfigError
from vitrail.reporting.predictions import check_format, overlay_names, prediction_picture, prediction_writer
from vitrail.reporting.tables import near
from vitrail.runs.config import check_choices, check_keys, plain
from vitrail.runs.images import find_images, open_image
from vitrail.runs.logs import set_up_logging
from vitrail.runs.prediction import DTYPES, Prediction, predictions, require_classifier
from vitrail.runs.trained import TrainedModel, load_run

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
    images = find_images(config.images)
    overlay = None if config.overlay is None else Path(config.overlay).expanduser().absolute()
    if overlay and any(Path(image).absolute().is_relative_to(overlay) for image in images):
        raise ConfigError(f"overlay={config.overlay}: contains some of the images; choose another folder.")
    model = None if config.model is None else plain(config.model)
    trained = load_run(config.ckpt, config.weights, model, image_size=config.image_size)
    require_classifier(trained.model, f"ckpt={config.ckpt}")
    log.info("%s, %s weights: %d images", trained.name, trained.weights, len(images))
    unreadable = _write(config, trained, images, out, overlay)
    skipped = out.with_name(f"{out.stem}_skipped.txt")
    skipped.unlink(missing_ok=True)
    log.info("%s: %d predictions", near(out), len(images) - len(unreadable))
    if unreadable:
        skipped.write_text("".join(f"{line}\n" for line in unreadable), encoding="utf-8", errors="backslashreplace")
        for line in unreadable[:_SHOWN]:
            log.warning("%s", line)
        log.error("%d of %d images skipped, listed in %s", len(unreadable), len(images), near(skipped))
    return not unreadable


def _write(config: DictConfig, trained: TrainedModel, images: list[str], out: Path, overlay: Path | None) -> list[str]:
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
    )
    with prediction_writer(out, top_k) as write:
        for result in _with_progress(results, len(images)):
            target = next(targets, None)
            if result.problem:
                unreadable.append(result.problem)
                continue
            write(result.image, result.classes, result.probabilities)
            if target is not None:
                _draw(trained, result, target)
        if len(unreadable) == len(images):
            raise ConfigError(f"images={config.images}: no image can be read; the first: {unreadable[0]}")
    return unreadable


def _draw(trained: TrainedModel, result: Prediction, path: Path) -> None:
    """Write the picture of a prediction.

    Raises:
        ConfigError: it cannot be written.
    """
    image = open_image(result.image, result.image, trained.input.value_range)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prediction_picture(image, result.classes, result.probabilities).save(path, quality=90)
    except OSError as error:
        raise ConfigError(f"overlay: cannot write {path} ({error.strerror or error}).") from error


def _with_progress(results: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress("predicting", *columns, console=get_console(), transient=True) as progress:
        yield from progress.track(results, total=total)
