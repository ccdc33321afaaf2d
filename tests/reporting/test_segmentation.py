"""Pictures of masks: over their images, with legends, and the callback that draws them."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data.segmentation.values import class_colours
from vitrail.reporting import PredictedMasksPicture
from vitrail.reporting.segmentation import MaskedRow, legend_of, mask_picture, masks_sheet
from vitrail.types import MASK_IGNORE, Batch

NAMES = ("sky", "[red] house", "a class with a name that is far too long for a legend")


class Kept:
    """Logger that keeps its pictures."""

    def __init__(self):
        self.experiment, self.kept = self, []

    def add_image(self, name, pixels, epoch, dataformats):
        self.kept.append((name, len(pixels)))


Kept.__name__ = "TensorBoardLogger"


def halves(left, right):
    """Return a mask (40, 60) of two classes."""
    return np.repeat([[left] * 30 + [right] * 30], 40, axis=0)


def test_legend__classes_by_their_share_in_each_mask():
    entries = legend_of([halves(0, 1), halves(1, MASK_IGNORE)], NAMES)
    assert [text for _, text in entries] == ["[red] house  50.0%, 50.0%", "sky  50.0%, 0.0%"]
    assert [colour for colour, _ in entries] == [tuple(colour) for colour in class_colours(3)[[1, 0]].tolist()]
    assert legend_of([halves(2, 2)], NAMES)[0][1] == "a class with a name…  100.0%"


def test_mask_picture__the_classes_colour_over_the_image_and_in_the_legend():
    picture = mask_picture(Image.new("RGB", (60, 40), "white"), halves(0, 2), NAMES)
    assert picture.size == (60 + 8 + 236, 44)
    for number, x in ((0, 10), (2, 50)):
        colour = class_colours(3)[number]
        assert picture.getpixel((x, 20)) == tuple((colour.astype(int) + 255) // 2)
        assert picture.getpixel((60 + 8 + 5, 22 * (number == 2) + 8)) == tuple(colour)
    assert mask_picture(Image.new("RGB", (60, 4000)), np.zeros((4000, 60), int), NAMES).height == 1024


def test_sheet__image_prediction_and_label_in_a_row():
    rows = [MaskedRow(np.full((40, 60, 3), 255, np.uint8), halves(0, 0), halves(1, 1))] * 2
    sheet = masks_sheet(rows, NAMES)
    assert sheet.size == (6 + 3 * 174 + 236, 40 + 2 * 174)
    colours = [tuple((class_colours(2)[number].astype(int) + 255) // 2) for number in (0, 1)]
    for row in range(2):
        shown = [sheet.getpixel((90 + 174 * column, 118 + 174 * row)) for column in range(3)]
        assert shown == [(255, 255, 255), *colours]


@pytest.mark.parametrize(("count", "drawn"), [(8, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (1, [0])])
def test_callback__draws_different_images_evenly_spread(tmp_path, count, drawn):
    logger = Kept()
    trainer = SimpleNamespace(
        num_val_batches=[5],
        current_epoch=1,
        max_epochs=9,
        sanity_checking=False,
        precision_plugin=SimpleNamespace(val_step_context=nullcontext),
        is_global_zero=True,
        loggers=[logger],
        datamodule=SimpleNamespace(classes=NAMES),
    )
    seen = []

    def predicted_mask(image):
        seen.append(int(image[0, 0, 0]))
        return torch.zeros(image.shape[1:], dtype=torch.int64)

    callback = PredictedMasksPicture(tmp_path / "predictions.png", every=2, count=count)
    for epoch in (0, 1, 3):
        trainer.current_epoch = epoch
        for number in range(5):
            size = (8 + number, 10)
            image = torch.full((1, 3, *size), number, dtype=torch.uint8)
            batch = Batch(image, torch.ones(1, *size, dtype=torch.uint8), ["key"])
            callback.on_validation_batch_end(
                trainer, SimpleNamespace(predicted_mask=predicted_mask), None, batch, number
            )
    assert seen == drawn * 2
    assert logger.kept == [("predictions", 40 + len(drawn) * 174)] * 2
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.height == 40 + len(drawn) * 174
