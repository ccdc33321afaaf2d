"""Pictures of label maps have the right colours in the right places."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data import Augmentation, MixToken
from vitrail.data.dataset import TrainingTransform, ViewDataset
from vitrail.data.label_maps import LabelMapJoin, LabelMapStore
from vitrail.data.mixing import TokenMix
from vitrail.data.render import PILRenderer
from vitrail.errors import ImageError
from vitrail.reporting.colours import class_colours
from vitrail.reporting.label_maps import label_map_sheet
from vitrail.reporting.tables import describe
from vitrail.types import InputSpec, Sample

PIXELS = InputSpec((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Greys:
    """A split of four grey images, the third of which is unreadable."""

    labels = np.array([0, 1, 0, 1])

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise ImageError("g/2: not a readable image")
        return Sample(Image.new("RGB", (64, 48), (128, 128, 128)), index % 2, f"g/{index}")

    def keys(self):
        return [f"g/{index}" for index in range(4)]


@pytest.fixture
def sheet(tmp_path):
    """Picture of maps with class 0 on the left, at high probability, and class 1 on the right, at low probability."""
    writer = LabelMapStore.create(tmp_path / "maps", 4, 1, (4, 4), 3, Greys().keys(), annotator="me")
    classes = np.repeat([[0, 0, 1, 1]], 4, axis=0)[None]
    for index in range(4):
        writer.write(index, np.where(classes == 0, 20.0, 1.0), classes)
    maps = LabelMapJoin(writer.finish(), Greys().keys(), ["a", "b", "c"])
    dataset = ViewDataset(
        Greys(),
        TrainingTransform(Augmentation(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3)).views(PIXELS, 0.0), PILRenderer(PIXELS)),
        0,
        maps=maps,
    )
    names = ["a", "b", "c"]
    return np.asarray(label_map_sheet(dataset, PIXELS, (4, 4), MixToken(), names, names, count=4)).astype(int)


def cell(sheet, row, panel, x, y):
    """Return the colour at the centre of a cell, for a grid of 4 x 4 cells per panel."""
    return sheet[40 + row * 186 + 21 + 42 * y, 6 + panel * 174 + 21 + 42 * x]


def test_sheet__colours_follow_the_maps(sheet):
    assert sheet.shape == (40 + 3 * 186, 6 + 5 * 174 + 236, 3), "the unreadable image is omitted"
    for row in range(3):
        assert cell(sheet, row, 0, 0, 0).tolist() == [128, 128, 128]
        for panel in (1, 3):  # the map, and the targets of a crop that is the whole image
            left, right = cell(sheet, row, panel, 0, 2), cell(sheet, row, panel, 3, 1)
            assert left[0] - left[1] > 100, "class a is red, with high probability"
            assert 10 < right[2] - right[0] < 90, "class b is blue, with low probability"
    legend = sheet[40 : 40 + 168, -236:]
    assert (legend == (230, 25, 75)).all(-1).sum() == 13 * 13


def test_describe__readable_imagenet_names():
    assert describe("n07920052") == "espresso"
    assert describe("my class") == "my class"


def test_sheet__shows_the_box_swapped_by_mixtoken(tmp_path):
    """The first image is black with class 0; its mixing partner is white with class 1."""

    class Two(Greys):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Sample(Image.new("RGB", (64, 64), (255 * index,) * 3), index, f"g/{index}")

        def keys(self):
            return ["g/0", "g/1"]

    writer = LabelMapStore.create(tmp_path / "maps", 2, 1, (2, 2), 2, Two().keys())
    for index in range(2):
        writer.write(index, np.full((1, 2, 2), 20.0), np.full((1, 2, 2), index))
    maps = LabelMapJoin(writer.finish(), Two().keys(), ["a", "b"])
    dataset = ViewDataset(
        Two(), TrainingTransform(Augmentation(scale=(1.0, 1.0)).views(PIXELS, 0.0), PILRenderer(PIXELS)), 0, maps=maps
    )

    class Corner:
        def for_batch(self, image_shape, grid, key):
            return TokenMix(torch.tensor([0, 0, 2, 2]), 0.75)

    sheet = np.asarray(label_map_sheet(dataset, PIXELS, (4, 4), Corner(), ["a", "b"], ["a", "b"], count=2)).astype(int)
    inside, outside = cell(sheet, 0, 4, 0, 1), cell(sheet, 0, 4, 3, 3)
    assert inside.sum() > 2 * outside.sum(), "white behind the colour"
    assert outside[0] > outside[2], "class a is red in its own row"
    assert inside[2] > inside[0], "class b is blue there"


def test_sheet__a_class_keeps_its_colour_over_all_rows(tmp_path):
    """Class b is second in the first row, and first in the last one; class c comes up in the last row only."""
    writer = LabelMapStore.create(tmp_path / "maps", 4, 1, (4, 4), 3, Greys().keys())
    columns = {0: [0, 0, 0, 1], 1: [0, 0, 0, 1], 3: [1, 1, 1, 2]}
    for index in range(4):
        writer.write(index, np.full((1, 4, 4), 20.0), np.repeat([columns.get(index, columns[0])], 4, axis=0)[None])
    maps = LabelMapJoin(writer.finish(), Greys().keys(), ["a", "b", "c"])
    whole = Augmentation(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3)).views(PIXELS, 0.0)
    dataset = ViewDataset(Greys(), TrainingTransform(whole, PILRenderer(PIXELS)), 0, maps=maps)
    names = ["a", "b", "c"]
    sheet = np.asarray(label_map_sheet(dataset, PIXELS, (4, 4), None, names, names, count=4)).astype(int)
    first, last = cell(sheet, 0, 1, 3, 1), cell(sheet, 2, 1, 0, 1)
    np.testing.assert_array_equal(first, last)
    assert first[2] > first[0] + 60, "blue, as the second class of the first row"
    assert len({tuple(colour) for colour in (cell(sheet, 0, 1, 0, 1), last, cell(sheet, 2, 1, 3, 1))}) == 3


def test_colours__are_fixed_for_few_classes_and_distinct_for_many():
    colours = class_colours(range(200), 200)
    assert len(set(colours.values())) == 200
    assert class_colours([7, 3, 7], 1000)[7] == colours[0]
    assert class_colours([7, 3, 7], 10) == {7: colours[7], 3: colours[3]}
