"""Picture of the most frequent confusions, with images of each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.data.images import as_image, to_rgb
from vitrail.data.sources import Split
from vitrail.errors import ImageError
from vitrail.reporting.evaluation import Evaluation
from vitrail.reporting.tables import describe
from vitrail.training.predictions import Predictions

_TILE, _GAP, _CAPTION = 112, 4, 20  # pixels


class Pair(NamedTuple):
    """Images of one class that are predicted as another."""

    label: int
    called: int
    images: int


def worst_pairs(evaluation: Evaluation, count: int) -> list[Pair]:
    """Return the `count` pairs of classes with the most images that are confused."""
    pairs = [Pair(score.label, called, images) for score in evaluation.classes for called, images in score.wrong]
    return sorted(pairs, key=lambda pair: -pair.images)[:count]


def confused_pairs(
    evaluation: Evaluation,
    names: Sequence[str],
    predictions: Predictions,
    split: Split,
    rows: int = 8,
    columns: int = 6,
) -> Image.Image | None:
    """Draw the most confused pairs of classes, one per row, with the most confident of their images.

    Args:
        evaluation: scores of the predictions.
        names: class names.
        predictions: predictions for the images of the split.
        split: the images.
        rows: maximum number of pairs.
        columns: maximum number of images per pair.

    Returns:
        None if no image is confused.
    """
    pairs = worst_pairs(evaluation, rows)
    if not pairs:
        return None
    height = _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, len(pairs) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    chosen = [_most_confident(pair, predictions, columns) for pair in pairs]
    index_of = _indices(split, {predictions.keys[row] for found in chosen for row in found})
    for number, (pair, found) in enumerate(zip(pairs, chosen, strict=True)):
        top = _GAP + number * height
        text = f"{describe(names[pair.label])[:36]}, called {describe(names[pair.called])[:36]}: {pair.images}"
        draw.text((_GAP, top), text, fill="black", font=font)
        for column, row in enumerate(found):
            tile = _tile(split, index_of[predictions.keys[row]])
            sheet.paste(tile, (_GAP + column * (_TILE + _GAP), top + _CAPTION))
    return sheet


def _most_confident(pair: Pair, predictions: Predictions, count: int) -> list[int]:
    """Return the rows of a pair's images, the most confident first."""
    rows = np.flatnonzero((predictions.labels == pair.label) & (predictions.classes[:, 0] == pair.called))
    return rows[np.argsort(-predictions.probabilities[rows, 0], kind="stable")][:count].tolist()


def _indices(split: Split, wanted: set[str]) -> dict[str, int]:
    return {key: index for index, key in enumerate(split.keys()) if key in wanted}


def _tile(split: Split, index: int) -> Image.Image:
    """Return the central square of an image; white if it can no longer be read."""
    try:
        image = as_image(to_rgb(split[index].image, getattr(split, "value_range", "type")))
    except ImageError:
        return Image.new("RGB", (_TILE, _TILE), "white")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    kernel = Image.Resampling.NEAREST if side < _TILE else Image.Resampling.BOX
    return image.resize((_TILE, _TILE), kernel, (left, top, left + side, top + side))
