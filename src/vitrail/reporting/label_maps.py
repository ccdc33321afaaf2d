"""Draw label maps over their images, before and after augmentation and MixToken.

Shapes: B images of H x W pixels, N patch tokens, C classes.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
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
from vitrail.reporting.class_grids import (
    ClassGrid,
    annotation_grid,
    class_grid,
    class_overlay,
    covered_box,
    draw_legend,
    main_classes,
)
from vitrail.reporting.colours import class_colours
from vitrail.reporting.panels import PANEL, PanelSheet
from vitrail.reporting.pictures import denormalise, log_picture
from vitrail.training import ImageClassifier
from vitrail.types import InputSpec, LabelMap, Sample
from vitrail_runtime.checking import PositiveInt, checked

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
    seen, tokens = _network_inputs(dataset, [*originals], spec, grid, transpose_crops)
    records = [int(dataset.maps.records[index]) for index in originals]
    annotations = [annotation_grid(store, record) for record in records]
    targets = [class_grid(image.T.reshape(-1, *grid)) for image in tokens]
    boxes = [_box_of_tokens(mixing, grid, row) if mixing else (0.0, 0.0, 0.0, 0.0) for row in range(len(targets))]
    mixtures = [
        ClassGrid(*map(partial(_swap, box=box), target, partner))
        for target, partner, box in zip(targets, reversed(targets), boxes, strict=True)
    ]
    listed = [main_classes(*grids) for grids in zip(annotations, targets, mixtures, strict=True)]
    colours = class_colours((index for row in listed for index in row), len(names))
    titles = _TITLES if mixing else _TITLES[:4]
    sheet = PanelSheet(titles, len(targets), _about(store), captions=True, legends=True)
    for row, sample in enumerate(originals.values()):
        view, whole = Image.fromarray(seen[row]), as_image(sample.image)
        annotated = class_overlay(whole, annotations[row], colours, covered_box(store, whole))
        panels = [whole, annotated, view, class_overlay(view, targets[row], colours)]
        if mixing:
            pixels_mixed = Image.fromarray(_swap(seen[row], seen[len(seen) - 1 - row], boxes[row]))
            panels.append(_framed(class_overlay(pixels_mixed, mixtures[row], colours), boxes[row]))
        label = classes[sample.label] if classes else ""
        sheet.paste(row, panels, f"{sample.key}  {label}"[:110])
        draw_legend(sheet, row, annotations[row], {index: colours[index] for index in listed[row]}, names)
    return sheet.image


def _network_inputs(
    dataset: ViewDataset, drawn: Sequence[int], spec: InputSpec, grid: tuple[int, int], transpose_crops: bool
) -> tuple[NDArray[np.uint8], Tensor]:
    """Return augmented images (B, H, W, 3) of a data set with label maps, and their token targets (B, N, C)."""
    assert dataset.maps is not None
    here = dataset.rendered_here()
    samples = [here[Draw(index, 0, False)] for index in drawn]
    seen = denormalise(torch.stack([sample.image for sample in samples]), spec.mean, spec.std)
    maps = LabelMap(*(torch.stack(parts) for parts in zip(*(sample.label_map for sample in samples), strict=True)))
    num_classes = dataset.maps.store.num_classes
    return seen, token_targets(*maps, grid, num_classes, smoothing=0.0, transpose_crops=transpose_crops).tokens


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


def _swap(array: NDArray[Any], other: NDArray[Any], box: tuple[float, float, float, float]) -> NDArray[Any]:
    """Return a copy of `array` (H, W, ...) with the box, given in shares of its sides, taken from `other`."""
    height, width = array.shape[:2]
    x1, y1, x2, y2 = (round(share * side) for share, side in zip(box, (width, height, width, height), strict=True))
    mixed = array.copy()
    mixed[y1:y2, x1:x2] = other[y1:y2, x1:x2]
    return mixed


def _framed(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    x1, y1, x2, y2 = (share * PANEL for share in box)
    if x2 > x1 and y2 > y1:
        ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), outline="white", width=2)
    return picture
