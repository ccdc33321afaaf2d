"""Draw label maps over their images, before and after augmentation and MixToken.

Shapes: C classes, H x W cells of a label map.
"""

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrail.data import Augmentation, MixToken
from vitrail.data.dataset import TrainingTransform, ViewDataset
from vitrail.data.images import as_image
from vitrail.data.label_maps import LabelMapJoin, LabelMapStore, token_targets
from vitrail.data.mixing import Mixing
from vitrail.data.render import PILRenderer
from vitrail.data.sampling import Draw, sample_of
from vitrail.data.sources import Split
from vitrail.errors import ImageError
from vitrail.models.heads import token_grid
from vitrail.objectives.contract import uses_of
from vitrail.reporting.colours import RGB, class_colours
from vitrail.reporting.pictures import denormalise, log_picture
from vitrail.reporting.tables import describe
from vitrail.training import ImageClassifier
from vitrail.types import InputSpec, LabelMap, Sample
from vitrail_runtime.checking import PositiveInt, checked

_PANEL, _GAP, _LEGEND, _HEAD, _FOOT = 168, 6, 236, 40, 18  # pixels
_LISTED = 7  # classes in the legend of a row
_OTHERS = (128, 128, 128)
_TITLES = ("image", "label map", "network input", "token targets", "after MixToken")


@checked
class LabelMapPicture(L.Callback):
    """Callback that draws some training images with their label maps; loggers get the picture too.

    Without label maps it does nothing.

    Args:
        path: file of the picture.
        count: maximum number of images in the picture.
    """

    def __init__(self, path: str | Path, count: PositiveInt = 8) -> None:
        self.path, self.count = Path(path), count

    def on_train_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Draw the picture if the objective uses token targets and the run is not resumed."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (
            getattr(data, "train", None) is None
            or data.train.maps is None
            or "token_targets" not in uses_of(pl_module.objective)
            or not trainer.is_global_zero
            or trainer.global_step > 0
        ):
            return
        grid = token_grid(pl_module.model, data.input.size)
        mixing: Any = pl_module.mixing
        mixes_tokens = mixing is not None and "mixes_tokens" in mixing.needs
        names, transposed = data.classes, pl_module.targets.transpose_crops
        picture = label_map_sheet(
            data.train, data.input, grid, mixing if mixes_tokens else None, names, names, self.count, transposed
        )
        picture.save(self.path)
        for logger in trainer.loggers:
            log_picture(logger, picture, "label_maps")


class TokenGrid(NamedTuple):
    """Most likely class (H, W) of each cell, and its probability (H, W)."""

    best: NDArray[np.int64]
    probability: NDArray[np.float32]


def preview(
    store: LabelMapStore, split: Split, count: int, classes: Sequence[str] | None, hflip: float = 0.5
) -> Image.Image:
    """Draw `count` images spread over a split with their label maps, with LV-ViT's crop, flip and MixToken.

    Args:
        store: label maps, one for each image of the split.
        split: images.
        count: maximum number of images.
        classes: the data's class names; None if the maps have other classes.
        hflip: probability of a horizontal flip.
    """
    names = list(store.about.get("class_names") or classes or map(str, range(store.num_classes)))
    spec = InputSpec((224, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    maps = LabelMapJoin(store, split.keys(), names)
    transform = TrainingTransform(Augmentation().views(spec, hflip), PILRenderer(spec))
    dataset = ViewDataset(split, transform, seed=0, maps=maps)
    return label_map_sheet(dataset, spec, (14, 14), MixToken(), names, classes, count)


def label_map_sheet(
    dataset: ViewDataset,
    spec: InputSpec,
    grid: tuple[int, int],
    mixing: Mixing | None,
    names: Sequence[str],
    classes: Sequence[str] | None,
    count: int = 12,
    transpose_crops: bool = False,
) -> Image.Image:
    """Draw one row per image: the image, its map, the network's input, its token targets, and both after MixToken.

    Colours are classes, the same in all rows, and paler for lower probabilities. The legend of each row lists its main
    classes with their share of the map's cells.

    Args:
        dataset: training images with label maps.
        spec: input of the network.
        grid: rows and columns of the network's tokens.
        mixing: mixing of the last panel; None omits the panel.
        names: names of the maps' classes.
        classes: names of the data's classes; None if they are not the maps'.
        count: maximum number of rows.
        transpose_crops: as in `TargetBuilder`.
    """
    assert dataset.maps is not None
    store = dataset.maps.store
    originals = _readable(dataset, count)
    drawn = list(originals)
    here = copy(dataset)
    if isinstance(dataset.transform, TrainingTransform):
        here.transform = dataset.transform._replace(on_device=False)
    samples = [here[Draw(index, 0, False)] for index in drawn]
    seen = denormalise(torch.stack([sample.image for sample in samples]), spec.mean, spec.std)
    maps = LabelMap(*(torch.stack(parts) for parts in zip(*(sample.label_map for sample in samples), strict=True)))
    tokens = token_targets(*maps, grid, store.num_classes, smoothing=0.0, transpose_crops=transpose_crops).tokens
    targets = [_best(image.T.reshape(-1, *grid)) for image in tokens]
    panels = _TITLES if mixing else _TITLES[:4]
    step = _PANEL + _GAP
    sheet = Image.new("RGB", (_GAP + len(panels) * step + _LEGEND, _HEAD + len(drawn) * (_PANEL + _FOOT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    draw.text((_GAP, 4), _about(store), "black", font)
    for number, title in enumerate(panels):
        draw.text((_GAP + number * step, 22), title, "black", font)
    records = [int(dataset.maps.records[index]) for index in drawn]
    annotations = [_best(_probabilities(*store[record], store.num_classes)) for record in records]
    boxes = [_box_of_tokens(mixing, grid, row) if mixing else (0.0, 0.0, 0.0, 0.0) for row in range(len(drawn))]
    partners = [*reversed(targets)]
    mixtures = [
        TokenGrid(*map(partial(_swap, box=box), target, partner))
        for target, partner, box in zip(targets, partners, boxes, strict=True)
    ]
    listed = [_main_classes(*grids) for grids in zip(annotations, targets, mixtures, strict=True)]
    colours = class_colours(index for row in listed for index in row)
    for row, index in enumerate(drawn):
        sample, annotation, mixed, box = originals[index], annotations[row], mixtures[row], boxes[row]
        mirror = len(drawn) - 1 - row
        view = Image.fromarray(seen[row])
        whole = as_image(sample.image).resize((_PANEL, _PANEL), Image.Resampling.BOX)
        annotated = _overlay(whole, annotation, colours, _covered(store, as_image(sample.image)))
        pictures = [whole, annotated, view, _overlay(view, targets[row], colours)]
        if mixing:
            pixels_mixed = Image.fromarray(_swap(seen[row], seen[mirror], box))
            pictures.append(_framed(_overlay(pixels_mixed, mixed, colours), box))
        top = _HEAD + row * (_PANEL + _FOOT)
        for number, picture in enumerate(pictures):
            sheet.paste(picture.resize((_PANEL, _PANEL), Image.Resampling.BOX), (_GAP + number * step, top))
        label = classes[sample.label] if classes else ""
        draw.text((_GAP, top + _PANEL + 1), f"{sample.key}  {label}"[:110], "black", font)
        shown = {index: colours[index] for index in listed[row]}
        _legend(draw, font, (sheet.width - _LEGEND, top), annotation, shown, names)
    return sheet


def _readable(dataset: ViewDataset, count: int) -> dict[int, Sample]:
    """Return up to `count` images, spread over the data set, that have a map and are readable."""
    assert dataset.maps is not None
    found = {}
    for index in map(int, sample_of(len(dataset), count)):
        if dataset.maps.records[index] >= 0:
            with suppress(ImageError):  # the training reports or skips the image, as data.on_corrupt says
                found[index] = dataset.split[index]
    return found


def _box_of_tokens(mixing: Any, grid: tuple[int, int], row: int) -> tuple[float, float, float, float]:
    """Draw a random MixToken box and return (x1, y1, x2, y2) as shares of the grid."""
    top, left, bottom, right = mixing.for_batch(torch.Size((2, 3, *grid)), grid, (0, row)).token_box.tolist()
    return left / grid[1], top / grid[0], right / grid[1], bottom / grid[0]


def _about(store: LabelMapStore) -> str:
    grid = f"{store.grid[0]} x {store.grid[1]} cells"
    what = (
        f"top {store.top_k} of {store.num_classes} classes, {grid}, {store.about.get('coverage', 'coverage unknown')}"
    )
    return f"{store.about.get('annotator', 'label maps')}, {what}"


def _probabilities(scores: NDArray[np.float16], classes: NDArray[np.integer], num_classes: int) -> Tensor:
    """Return a map's class probabilities (C, H, W) as in training: classes that are not stored have score 0."""
    dense = torch.zeros(num_classes, *scores.shape[1:])
    dense.scatter_(0, torch.from_numpy(classes.astype(np.int64)), torch.from_numpy(scores).float())
    return dense.softmax(0)


def _best(probabilities: Tensor) -> TokenGrid:
    values, indices = probabilities.max(0)
    return TokenGrid(indices.numpy(), values.numpy())


def _main_classes(*grids: TokenGrid) -> list[int]:
    """Return the classes with the highest total probability in these grids, in that order."""
    best = np.concatenate([grid.best.ravel() for grid in grids])
    weight = np.bincount(best, np.concatenate([grid.probability.ravel() / grid.best.size for grid in grids]))
    return [int(index) for index in np.argsort(-weight, kind="stable")[:_LISTED] if weight[index] > 0]


def _covered(store: LabelMapStore, image: Image.Image) -> tuple[float, float, float, float]:
    """Return the box (x1, y1, x2, y2) of the image that its map covers, as shares of the image's sides."""
    if store.about.get("coverage") != "center square":
        return 0.0, 0.0, 1.0, 1.0
    side = min(image.size)
    x, y = (1 - side / image.width) / 2, (1 - side / image.height) / 2
    return x, y, 1 - x, 1 - y


def _overlay(
    picture: Image.Image,
    grid: TokenGrid,
    colours: dict[int, RGB],
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Image.Image:
    """Return the picture in grey, with the colour of the most likely class over each cell."""
    picture = picture.resize((_PANEL, _PANEL), Image.Resampling.BOX)
    tint = np.array([[colours.get(int(best), _OTHERS) for best in row] for row in grid.best], np.uint8)
    strength = (255 * (0.1 + 0.55 * grid.probability)).astype(np.uint8)
    corners = [round(_PANEL * share) for share in box]
    size = (corners[2] - corners[0], corners[3] - corners[1])
    colour = Image.fromarray(tint).resize(size, Image.Resampling.NEAREST)
    mask = Image.fromarray(strength).resize(size, Image.Resampling.NEAREST)
    base = picture.convert("L").convert("RGB")
    base.paste(colour, (corners[0], corners[1]), mask)
    return base


def _swap(array: NDArray[Any], other: NDArray[Any], box: tuple[float, float, float, float]) -> NDArray[Any]:
    """Return a copy of `array` (H, W, ...) with the box, given in shares of its sides, taken from `other`."""
    height, width = array.shape[:2]
    x1, y1, x2, y2 = (round(share * side) for share, side in zip(box, (width, height, width, height), strict=True))
    mixed = array.copy()
    mixed[y1:y2, x1:x2] = other[y1:y2, x1:x2]
    return mixed


def _framed(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    x1, y1, x2, y2 = (share * _PANEL for share in box)
    if x2 > x1 and y2 > y1:
        ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), outline="white", width=2)
    return picture


def _legend(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    corner: tuple[int, int],
    grid: TokenGrid,
    colours: dict[int, RGB],
    names: Sequence[str],
) -> None:
    """Draw the legend: each colour's class, its share of the cells and its mean probability there."""
    x, y = corner
    for number, (index, colour) in enumerate(colours.items()):
        cells = grid.best == index
        draw.rectangle((x, y + 22 * number + 3, x + 12, y + 22 * number + 15), fill=colour)
        share = f"{cells.mean():.0%}, p {grid.probability[cells].mean():.2f}" if cells.any() else "elsewhere"
        draw.text((x + 18, y + 22 * number + 2), f"{describe(names[index])[:20]}  {share}", "black", font)
