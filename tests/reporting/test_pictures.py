import numpy as np
import torch
from PIL import Image

from vitrail.data.mixing import PixelMix
from vitrail.reporting.pictures import batch_grid, denormalise
from vitrail.types import Batch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def test_denormalise__inverts_the_normalisation():
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    np.testing.assert_array_equal(denormalise(normalised, MEAN, STD), pixels.permute(0, 2, 3, 1).numpy())


def test_grid__shows_each_image_and_its_caption():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]]) / 255
    images = (colours[:, :, None, None].expand(3, 3, 8, 8) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    mix = PixelMix(torch.tensor([0.7, 1.0, 0.5]), None, None, (8, 8))
    sheet = batch_grid(Batch(images, torch.tensor([0, 1, 1]), [], mix=mix), ["apple", "pear"], MEAN, STD, count=2)
    assert isinstance(sheet, Image.Image)
    assert sheet.getpixel((70, 70)) == (255, 0, 0)
    assert sheet.getpixel((220, 70)) == (0, 255, 0)
    assert sheet.width == 2 * 148 + 4  # the third image is omitted
    captions = np.asarray(sheet.convert("L"))[150:, :]
    assert (captions < 128).sum() > 50


def test_grid__plain_labels():
    sheet = batch_grid(Batch(torch.zeros(1, 3, 4, 4), torch.tensor([1]), []), ["a", "b"], MEAN, STD)
    assert sheet.getpixel((70, 70)) == (102, 128, 153)
