"""Pictures and tables of semantic segmentation.

Shapes: B images, H x W pixels, C classes.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Group
from rich.text import Text
from torch import Tensor

from vitrail.data.images import as_array
from vitrail.data.sampling import sample_of
from vitrail.data.segmentation.values import class_colours
from vitrail.errors import ImageError
from vitrail.reporting.colours import RGB
from vitrail.reporting.panels import LEGEND, LEGEND_LINE, PANEL, PanelSheet, draw_legend_lines
from vitrail.reporting.pictures import FirstBatchPicture, denormalise, image_grid
from vitrail.reporting.predictions import table_writer
from vitrail.reporting.tables import shortened
from vitrail.reporting.validation_pictures import ValidationPicture
from vitrail.training.segmentation import SegmentationScores
from vitrail.types import MASK_IGNORE, Batch
from vitrail_runtime.checking import PositiveInt, checked
from vitrail_runtime.names import readable
from vitrail_runtime.tables import PlainTable

_SIDE = 288  # pixels of an image in a picture of overlays, before it is drawn as a tile
_LARGEST, _MARGIN = 1024, 8  # pixels of the longer side of a picture, and between it and its legend
_LEGEND = "the legend has each class's share of the pixels, predicted and labelled"
_LISTED, _LONGEST = 30, 20  # classes in a legend, and characters of a name
_SHOWN = 10  # classes in the table of the terminal, from each end


def overlay(image: NDArray[np.uint8], mask: NDArray[np.integer], num_classes: int) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) with the colours of its mask (H, W) over it; pixels without label are dimmed."""
    colours = np.zeros((MASK_IGNORE + 1, 3), np.uint8)
    colours[:num_classes] = class_colours(num_classes)
    return ((image.astype(np.uint16) + colours[mask]) // 2).astype(np.uint8)


def mask_image(mask: NDArray[np.integer]) -> Image.Image:
    """Return a mask (H, W) with a palette: the values are the classes, the palette shows them in their colours."""
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(class_colours(MASK_IGNORE).tobytes() + bytes(3))
    return picture


def legend_of(masks: Sequence[NDArray[np.integer]], names: Sequence[str]) -> list[tuple[RGB, str]]:
    """Return colour and text of the largest classes of masks (H, W): name, and share of the pixels in each mask."""
    counts = np.stack([np.bincount(mask.ravel(), minlength=MASK_IGNORE + 1)[: len(names)] for mask in masks])
    shares = counts / np.array([[mask.size] for mask in masks])
    order = [index for index in np.argsort(-shares.sum(0), kind="stable") if shares[:, index].any()]
    colours = class_colours(len(names)).tolist()
    entries = []
    for index in order[:_LISTED]:
        entries.append(
            (
                tuple(colours[index]),
                f"{shortened(names[index], _LONGEST)}  {', '.join(f'{share:.1%}' for share in shares[:, index])}",
            )
        )
    return entries


def mask_picture(image: Image.Image, mask: NDArray[np.integer], names: Sequence[str]) -> Image.Image:
    """Draw a mask (H, W) over its image, at most 1024 pixels wide and high, with a legend of the classes."""
    drawn = Image.fromarray(overlay(np.asarray(image), mask, len(names)))
    drawn.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BOX)
    entries = legend_of([mask], names)
    sheet = Image.new("RGB", (drawn.width + _MARGIN + LEGEND, max(drawn.height, LEGEND_LINE * len(entries))), "white")
    sheet.paste(drawn, (0, 0))
    draw_legend_lines(ImageDraw.Draw(sheet), (drawn.width + _MARGIN, 0), entries)
    return sheet


@contextmanager
def share_writer(path: Path, names: Sequence[str]) -> Iterator[Callable[[str, str, Sequence[float]], None]]:
    """Open a table of predicted masks, and yield a function that writes image, mask file and shares (C).

    The columns are `image`, `mask`, and for each class `share_<name>`, its share of the pixels. A line of JSON has
    `image`, `mask` and `shares`, without the classes that are absent.

    Args:
        path: as in `table_writer`.
        names: names of the C classes.

    Raises:
        ConfigError: as `table_writer`.
    """
    columns = {"image": str, "mask": str, **{f"share_{name}": float for name in names}}
    with table_writer(path, columns) as write_row:

        def write(image: str, mask: str, shares: Sequence[float]) -> None:
            found = {name: round(share, 6) for name, share in zip(names, shares, strict=True) if share}
            files = {"image": readable(image), "mask": readable(mask)}
            write_row([*files.values(), *shares], {**files, "shares": found})

        yield write


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
        mask_image(mask).save(path)
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


@checked
class PredictedMasksPicture(ValidationPicture):
    """Callback that draws validation images, evenly spread, each beside its predicted mask and its label.

    The classes in the legend of an image have their shares of its pixels, predicted and labelled.

    Args:
        path: file of the last picture.
        every: epochs between two pictures; None for none.
        count: maximum number of images.
    """

    name = "predictions"

    def __init__(self, path: str | Path, every: PositiveInt | None = None, count: PositiveInt = 8) -> None:
        super().__init__(path, every, count)
        self._rows: list[MaskedRow] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict the batch if it is one of those to draw, and save the picture after the last of them.

        Validation batches have one image. All processes do this, because a sharded model needs them.
        """
        chosen = sample_of(int(trainer.num_val_batches[dataloader_idx]), self.count)
        if dataloader_idx > 0 or batch_idx not in chosen or not self.is_due(trainer):
            return
        if batch_idx == chosen[0]:
            self._rows.clear()
        with trainer.precision_plugin.val_step_context():
            self._rows += [
                MaskedRow(image.permute(1, 2, 0).cpu().numpy(), *(part.byte().cpu().numpy() for part in pair))
                for image, *pair in zip(
                    batch.image, map(pl_module.predicted_mask, batch.image), batch.label, strict=True
                )
            ]
        if batch_idx == chosen[-1]:
            self.save(trainer, masks_sheet(self._rows, trainer.datamodule.classes))  # type: ignore[attr-defined]
            self._rows.clear()


class MaskedRow(NamedTuple):
    """An image (H, W, 3), uint8, its predicted mask (H, W) and its label (H, W)."""

    image: NDArray[np.uint8]
    predicted: NDArray[np.integer]
    label: NDArray[np.integer]


def masks_sheet(rows: Sequence[MaskedRow], names: Sequence[str]) -> Image.Image:
    """Draw images with their predicted masks and their labels over them, one row each, with a legend."""
    sheet = PanelSheet(("image", "predicted", "label"), len(rows), _LEGEND, legends=True)
    for number, (image, *masks) in enumerate(rows):
        panels = [image, *(overlay(image, mask, len(names)) for mask in masks)]
        sheet.paste(number, [Image.fromarray(panel) for panel in panels])
        sheet.legend(number, legend_of(masks, names)[: PANEL // LEGEND_LINE])
    return sheet.image


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
