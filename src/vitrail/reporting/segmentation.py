"""Pictures and tables of semantic segmentation.

Shapes: B images, H x W pixels, C classes.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Group
from rich.text import Text
from torch import Tensor

from vitrail.data.images import as_array
from vitrail.data.sampling import sample_of
from vitrail.data.segmentation.values import class_colours
from vitrail.errors import ImageError
from vitrail.reporting.pictures import FirstBatchPicture, denormalise, image_grid
from vitrail.reporting.validation_pictures import PredictionPicture
from vitrail.training.segmentation import SegmentationScores
from vitrail.types import MASK_IGNORE, Batch
from vitrail_runtime.checking import checked
from vitrail_runtime.tables import PlainTable

_SIDE = 288  # pixels of an image in a picture of overlays, before it is drawn as a tile
_SHOWN = 10  # classes in the table of the terminal, from each end


def overlay(image: NDArray[np.uint8], mask: NDArray[np.integer], num_classes: int) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) with the colours of its mask (H, W) over it; pixels without label are dimmed."""
    colours = np.zeros((MASK_IGNORE + 1, 3), np.uint8)
    colours[:num_classes] = class_colours(num_classes)
    return ((image.astype(np.uint16) + colours[mask]) // 2).astype(np.uint8)


def save_mask(mask: NDArray[np.integer], path: Path) -> None:
    """Save a mask (H, W) as palette PNG: the values are the classes, the palette shows them in their colours."""
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(class_colours(MASK_IGNORE).tobytes() + bytes(3))
    picture.save(path)


class MaskWriter:
    """Writer of predicted masks: `<key>.png` with a palette, and `<key>_overlay.jpg`.

    Args:
        folder: where to write.
        num_classes: number of classes, C.
    """

    def __init__(self, folder: Path, num_classes: int) -> None:
        self.folder, self.num_classes = folder, num_classes

    def __call__(self, key: str, image: Tensor, predicted: Tensor) -> None:
        """Write the predicted classes (H, W) of an image (3, H, W), uint8."""
        path = self.folder / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = predicted.cpu().numpy()
        save_mask(mask, path)
        drawn = overlay(image.permute(1, 2, 0).cpu().numpy(), mask, self.num_classes)
        Image.fromarray(drawn).save(path.with_name(f"{path.stem}_overlay.jpg"))


@checked
class FirstMasksPicture(FirstBatchPicture):
    """Callback that saves the first training batch, augmented, with its masks over the images.

    It reveals masks that are shifted, of wrong values or of other images. Captions name the two largest classes.
    """

    def draw(self, batch: Batch, data: Any) -> Image.Image:
        """Return the picture of a batch of `data`, a data module."""
        images = denormalise(batch.image[: self.count], data.input.mean, data.input.std)
        masks = batch.label[: self.count].cpu().numpy()
        drawn = [overlay(image, mask, len(data.classes)) for image, mask in zip(images, masks, strict=True)]
        return image_grid(np.stack(drawn), [_largest(mask, data.classes) for mask in masks])


class PredictedMasksPicture(PredictionPicture):
    """Callback that draws the first validation images with their predicted masks, each beside its label."""

    def draw(self, module: Any, batch: Batch, data: Any) -> Image.Image:
        """Return the picture of a batch of whole images (B, 3, H, W), uint8."""
        drawn, captions = [], []
        for image, mask in zip(batch.image[: self.count], batch.label[: self.count], strict=True):
            for what, shown in (("predicted", module.predicted_mask(image)), ("label", mask)):
                classes = shown.cpu().numpy()
                drawn.append(overlay(image.permute(1, 2, 0).cpu().numpy(), classes, len(data.classes)))
                captions.append(f"{what}\n{_largest(classes, data.classes)}".rsplit("\n", 1)[0])
        return image_grid(np.stack(drawn), captions)


def _largest(mask: NDArray[np.integer], classes: Sequence[str]) -> str:
    counts = np.bincount(mask.ravel(), minlength=MASK_IGNORE + 1)[:MASK_IGNORE]
    best = np.argsort(-counts, kind="stable")[:2]
    return "\n".join(f"{counts[index] / mask.size:.2f} {classes[index][:19]}" for index in best if counts[index])


def overlays(splits: Sequence[Any], classes: Sequence[str], count: int) -> Image.Image | None:
    """Draw up to `count` images of each split with their masks, evenly spread; None if none can be read."""
    drawn, captions = [], []
    for split in splits:
        for index in sample_of(len(split), count):
            try:
                sample = split[int(index)]
            except ImageError:
                continue
            picture = overlay(as_array(sample.image), sample.mask, len(classes))
            drawn.append(np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE))))
            captions.append(_largest(sample.mask, classes))
    return image_grid(np.stack(drawn), captions) if drawn else None


def write_class_scores(scores: SegmentationScores, classes: Sequence[str], path: Path) -> None:
    """Write IoU and accuracy of each class, in %, to a CSV file; empty if they are not defined."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "iou", "accuracy"])
        for name, *values in zip(classes, scores.iou.tolist(), scores.accuracy.tolist(), strict=True):
            rows.writerow([name, *("" if np.isnan(value) else f"{100 * value:.2f}" for value in values)])


def segmentation_report(
    results: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, SegmentationScores],
    classes: Sequence[str],
    title: str,
) -> Group:
    """Return the scores of each set of weights, how they were measured, and the best and worst classes."""
    table = PlainTable(title=title, title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key in ("mIoU", "mAcc", "aAcc"):
        table.add_row(f"{key} %", *(f"{result[key]:.2f}" for result in results.values()))
    first = next(iter(results))
    iou = scores[first].iou.tolist()
    order = sorted((index for index in range(len(classes)) if not np.isnan(iou[index])), key=lambda index: -iou[index])
    ends = order if len(order) <= 2 * _SHOWN else [*order[:_SHOWN], *order[-_SHOWN:]]
    for number, index in enumerate(ends):
        values = (f"{100 * float(scores[name].iou[index]):.2f}" for name in results)
        table.add_row(f"IoU {classes[index]}", *values, end_section=number == _SHOWN - 1 and len(ends) < len(order))
    return Group(table, Text(f"{results[first]['images']} images, {results[first]['inference']}"))
