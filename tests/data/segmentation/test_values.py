"""Masks: values, palettes and colours; what is no class is an error that names file and value."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data.segmentation.values import ValueTable, class_colours, distinct, read_mask
from vitrail.errors import ArgumentError, ConfigError, ImageError
from vitrail.types import MASK_IGNORE


def classes(table, *values):
    return table.classes(np.array([values]), "mask.png")[0].tolist()


def test_shift__zero_and_255_are_not_labelled():
    table = ValueTable(150, shift=-1, ignore=[0])
    assert classes(table, 0, 1, 150, 255) == [MASK_IGNORE, 0, 149, MASK_IGNORE]
    assert classes(ValueTable(150, shift=-1), 0, 1, 150, 255) == [MASK_IGNORE, 0, 149, MASK_IGNORE]


def test_shift__of_minus_two_needs_the_ignored_values():
    with pytest.raises(ImageError, match=r"mask\.png: has the value 0, which is no class"):
        classes(ValueTable(150, shift=-2), 0, 1, 2)
    assert classes(ValueTable(150, shift=-2, ignore=[0, 1]), 0, 1, 2, 255) == [255, 255, 0, 255]


def test_shift__uint8_does_not_wrap():
    mask = np.array([[0, 1, 255]], np.uint8)
    assert ValueTable(150, shift=-1).classes(mask, "m").tolist() == [[255, 0, 255]]
    assert ValueTable(2, shift=1, ignore=[254]).classes(np.array([[0, 254]], np.uint8), "m").tolist() == [[1, 255]]


def test_map__only_its_values_are_classes():
    table = ValueTable(2, map={7: 0, 33: 1}, ignore=[0])
    assert classes(table, 7, 33, 0, 255) == [0, 1, 255, 255]
    with pytest.raises(ImageError, match=r"mask\.png: has the value 8, which is no class"):
        classes(table, 7, 8)


@pytest.mark.parametrize("value", [3, 151, 254, 4000, 70000, -3])
def test_unknown_value__is_named_with_the_file(value):
    with pytest.raises(ImageError, match=rf"mask\.png: has the value {value}, which is no class; add it to data"):
        classes(ValueTable(3), 0, value)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_classes": 256}, "at most 255"),
    ({"num_classes": 3, "shift": -1, "map": {1: 0}}, "data.source.shift: cannot be combined"),
    ({"num_classes": 3, "map": {1: 3}}, "data.source.map: 1 maps to 3"),
    ({"num_classes": 3, "colours": [[0, 0, 0]]}, "1 colours for 3 classes"),
    ({"num_classes": 1, "shift": 1, "colours": [[0, 0, 0]]}, "cannot be combined"),
    ({"num_classes": 2, "colours": [[0, 0, 0], [0, 0, 0]]}, "a colour occurs twice"),
    ({"num_classes": 0}, "num_classes"),
])  # fmt: skip
def test_table__refuses_options_that_do_not_fit(options, message):
    with pytest.raises((ConfigError, ArgumentError), match=message):
        ValueTable(**options)


def test_palette__gives_indices_and_not_colours(tmp_path):
    mask = np.array([[0, 1], [20, 255]], np.uint8)
    picture = Image.fromarray(mask)
    picture.putpalette([number * 7 % 256 for number in range(768)])
    picture.save(tmp_path / "voc.png")
    assert Image.open(tmp_path / "voc.png").mode == "P"
    assert read_mask(tmp_path / "voc.png").tolist() == mask.tolist()


def test_sixteen_bits__are_kept(tmp_path):
    mask = np.array([[0, 255], [256, 4000]], np.uint16)
    Image.fromarray(mask).save(tmp_path / "wide.png")
    assert read_mask(tmp_path / "wide.png").tolist() == mask.tolist()
    table = ValueTable(2, map={256: 0, 4000: 1}, ignore=[0])
    assert table.classes(read_mask(tmp_path / "wide.png"), "wide.png").tolist() == [[255, 255], [0, 1]]


def test_colours__need_a_table(tmp_path):
    colours = np.array([[[128, 0, 0], [0, 128, 0], [224, 224, 192]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    values = read_mask(tmp_path / "rgb.png")
    with pytest.raises(ImageError, match=r"rgb\.png: stores colours, not classes.*data\.source\.colours"):
        ValueTable(2).classes(values, "rgb.png")
    table = ValueTable(2, colours=[[0, 128, 0], [128, 0, 0]], ignore_colours=[[224, 224, 192]])
    assert table.classes(values, "rgb.png").tolist() == [[1, 0, 255]]
    with pytest.raises(ImageError, match=r"rgb\.png: has the colour \[1, 2, 3\]"):
        table.classes(np.array([[[1, 2, 3]]], np.uint8), "rgb.png")
    with pytest.raises(ImageError, match="stores values, not colours"):
        table.classes(np.zeros((1, 1), np.uint8), "grey.png")


@pytest.mark.parametrize(("mode", "message"), [("RGBA", "is stored as RGBA"), ("F", "is stored as F")])
def test_other_modes__are_refused(mode, message, tmp_path):
    path = tmp_path / f"mask.{'tif' if mode == 'F' else 'png'}"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(ImageError, match=message):
        read_mask(path)


def test_broken_and_missing_files__are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no png")
    with pytest.raises(ImageError, match=r"broken\.png: not a readable mask"):
        read_mask(tmp_path / "broken.png")
    with pytest.raises(ImageError, match="no such file"):
        read_mask(tmp_path / "missing.png")


def test_class_colours__are_voc_s_and_distinct():
    colours = class_colours(255)
    assert colours[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert len(torch.unique(torch.from_numpy(colours), dim=0)) == 255


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_distinct__has_every_value_once(dtype):
    values = np.random.default_rng(0).choice([0, 3, 200, 255], (20, 30)).astype(dtype)
    assert distinct(values).tolist() == [[0, 3, 200, 255]]
    assert distinct(values).dtype == dtype


def test_distinct__has_every_colour_once():
    colours = np.array([[0, 0, 1], [0, 255, 0], [128, 64, 128], [255, 255, 255]], np.uint8)
    image = colours[np.random.default_rng(0).integers(0, 4, (20, 30))]
    assert distinct(image).tolist() == [colours.tolist()]
    table = ValueTable(4, colours=colours.tolist())
    assert table.classes(distinct(image), "m").tolist() == [[0, 1, 2, 3]]
