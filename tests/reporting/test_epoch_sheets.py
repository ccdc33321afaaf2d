"""Sheets of maps over the epochs of a training."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vitrail.reporting.class_grids import ClassGrid
from vitrail.reporting.epoch_sheets import MOST, add_class_epoch, add_epoch
from vitrail.reporting.panels import GAP, LEGEND, PANEL, cut_panels

ROWS = 2
NAMES = [f"class {number}" for number in range(1000)]


def column(value, rows=ROWS):
    return [Image.new("RGB", (PANEL, PANEL), (value, value, value))] * rows


def add(path, *epochs, rows=ROWS, scale=1):
    """Add epochs whose maps have the epoch's grey value."""
    for epoch in epochs:
        add_epoch(path, epoch, column(255, rows), column(scale * epoch, rows), "attention")
    return path


def shown(path):
    """Return the grey value of each column by epoch, with that of the images as epoch 0."""
    with Image.open(path) as sheet:
        columns = cut_panels(sheet, heading=True)
        epochs = [0, *json.loads(sheet.info["epochs"])]
    return {epoch: panels[-1].getpixel((80, 80))[0] for epoch, panels in zip(epochs, columns, strict=True)}


def add_classes(path, *epochs, rows=ROWS):
    """Add epochs whose grids have 2 x 2 cells: the epoch's class on the left, class 999 on the right."""
    for epoch in epochs:
        best = np.array([[epoch, 999], [epoch, 999]])
        grid = ClassGrid(best, np.full((2, 2), 0.8, np.float32))
        add_class_epoch(path, epoch, column(128, rows), [grid] * rows, NAMES, "classes")
    return path


def halves(path):
    """Return the colours of the left and the right half of each column by epoch."""
    with Image.open(path) as sheet:
        epochs = json.loads(sheet.info["epochs"])
        _, *columns, _ = cut_panels(sheet, heading=True)
    sides = [(panels[-1].getpixel((40, 80)), panels[-1].getpixel((120, 80))) for panels in columns]
    return dict(zip(epochs, sides, strict=True))


def test_sheet__a_column_for_each_epoch(tmp_path):
    path = add(tmp_path / "sheet.png", 2, 4, 6)
    assert shown(path) == {0: 255, 2: 2, 4: 4, 6: 6}
    with Image.open(path) as sheet:
        assert sheet.size == (GAP + 4 * (PANEL + GAP), 40 + ROWS * (PANEL + GAP))
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_sheet__a_class_has_one_colour_in_all_epochs(tmp_path):
    path = add_classes(tmp_path / "sheet.png", 2, 4, 6)
    left, right = zip(*halves(path).values(), strict=True)
    assert len(set(left)) == 3
    assert len(set(right)) == 1
    assert not set(left) & set(right)
    with Image.open(path) as sheet:
        assert sheet.size == (GAP + 4 * (PANEL + GAP) + LEGEND, 40 + ROWS * (PANEL + GAP))


def test_sheet__a_resumed_training_replaces_what_it_repeats(tmp_path):
    path = add(tmp_path / "sheet.png", 1, 2, 3, 4)
    assert shown(add(path, 3, scale=10)) == {0: 255, 1: 1, 2: 2, 3: 30}
    path = add_classes(tmp_path / "classes.png", 1, 2, 3, 4)
    assert list(halves(add_classes(path, 3))) == [1, 2, 3]


@pytest.mark.parametrize(("add", "read"), [(add, lambda path: list(shown(path))[1:]), (add_classes, halves)])
def test_sheet__many_epochs_keep_the_first_the_last_and_evenly_spread_ones(tmp_path, add, read):
    epochs = list(read(add(tmp_path / "sheet.png", *range(1, 41), rows=1)))
    assert len(epochs) == MOST
    assert (epochs[0], epochs[-1]) == (1, 40)
    gaps = [after - before for before, after in itertools.pairwise(epochs)]
    assert max(gaps) <= 8


@pytest.mark.parametrize("damage", ["cut", "text", "other rows", "no epochs"])
@pytest.mark.parametrize(("add", "read"), [(add, lambda path: list(shown(path))[1:]), (add_classes, halves)])
def test_sheet__a_file_that_does_not_fit_is_replaced(tmp_path, damage, add, read):
    path = add(tmp_path / "sheet.png", 1, 2)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("no picture")
    elif damage == "other rows":
        add(path, 1, 2, rows=3)
    else:
        Image.open(path).save(path)
    assert list(read(add(path, 3))) == [3]


def test_sheet__a_sheet_of_another_kind_is_replaced(tmp_path):
    path = add_classes(add(tmp_path / "sheet.png", 1, 2), 3)
    assert list(halves(path)) == [3]
