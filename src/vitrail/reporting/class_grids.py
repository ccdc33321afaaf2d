"""Draw grids of classes, such as label maps and the classes of patch tokens, over images.

Shapes: C classes, H x W cells of a grid.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrail.data.label_maps import LabelMapStore
from vitrail.reporting.colours import RGB
from vitrail.reporting.panels import PANEL, PanelSheet
from vitrail.reporting.tables import describe

Shares = tuple[float, float, float, float]
"""Box (x1, y1, x2, y2) as shares of the image's sides."""

WHOLE: Shares = (0.0, 0.0, 1.0, 1.0)
_LISTED = 7  # classes in the legend of a row
_OTHERS = (128, 128, 128)


class ClassGrid(NamedTuple):
    """Most likely class (H, W) of each cell, and its probability (H, W); -1 and 0 for a cell without classes."""

    best: NDArray[np.int64]
    probability: NDArray[np.float32]


def class_grid(probabilities: Tensor) -> ClassGrid:
    """Return the most likely classes of probabilities (C, H, W)."""
    values, indices = probabilities.cpu().max(0)
    return ClassGrid(indices.masked_fill(values == 0, -1).numpy(), values.numpy())


def annotation_grid(store: LabelMapStore, record: int | str) -> ClassGrid:
    """Return the most likely classes of a label map, with probabilities as in training: absent classes score 0."""
    scores, classes = store[record]
    dense = torch.zeros(store.num_classes, *scores.shape[1:])
    dense.scatter_(0, torch.from_numpy(classes.astype(np.int64)), torch.from_numpy(scores).float())
    return class_grid(dense.softmax(0))


def main_classes(*grids: ClassGrid) -> list[int]:
    """Return the classes with the highest total probability in these grids, in that order."""
    best = np.concatenate([grid.best.ravel() for grid in grids])
    shares = np.concatenate([grid.probability.ravel() / grid.best.size for grid in grids])
    weight = np.bincount(best[best >= 0], shares[best >= 0])
    return [int(index) for index in np.argsort(-weight, kind="stable")[:_LISTED] if weight[index] > 0]


def covered_box(store: LabelMapStore, image: Image.Image) -> Shares:
    """Return the box (x1, y1, x2, y2) of the image that its map covers, as shares of the image's sides."""
    if store.about.get("coverage") != "center square":
        return WHOLE
    side = min(image.size)
    x, y = (1 - side / image.width) / 2, (1 - side / image.height) / 2
    return x, y, 1 - x, 1 - y


def class_overlay(
    picture: Image.Image, grid: ClassGrid, colours: Mapping[int, RGB], box: Shares = WHOLE
) -> Image.Image:
    """Return the picture in grey, with the colour of the most likely class over each cell of the box."""
    picture = picture.resize((PANEL, PANEL), Image.Resampling.BOX)
    tint = np.array([[colours.get(int(best), _OTHERS) for best in row] for row in grid.best], np.uint8)
    strength = (255 * (0.1 + 0.55 * grid.probability)).astype(np.uint8)
    corners = [round(PANEL * share) for share in box]
    size = (corners[2] - corners[0], corners[3] - corners[1])
    colour = Image.fromarray(tint).resize(size, Image.Resampling.NEAREST)
    mask = Image.fromarray(strength).resize(size, Image.Resampling.NEAREST)
    base = picture.convert("L").convert("RGB")
    base.paste(colour, (corners[0], corners[1]), mask)
    return base


def draw_legend(sheet: PanelSheet, row: int, grid: ClassGrid, colours: Mapping[int, RGB], names: Sequence[str]) -> None:
    """Draw the legend of a row: each colour's class, its share of the cells and its mean probability there."""
    entries = []
    for index, colour in colours.items():
        cells = grid.best == index
        share = f"{cells.mean():.0%}, p {grid.probability[cells].mean():.2f}" if cells.any() else "elsewhere"
        entries.append((colour, f"{describe(names[index])[:20]}  {share}"))
    sheet.legend(row, entries)
