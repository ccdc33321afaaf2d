"""Sheets of maps over the epochs of a training."""

import itertools
import json

import pytest
from PIL import Image

from vitrail.reporting.epoch_sheets import MOST, add_epoch
from vitrail.reporting.panels import GAP, PANEL, cut_columns

ROWS = 2


def column(value, rows=ROWS):
    return Image.new("RGB", (PANEL, rows * (PANEL + GAP)), (value, value, value))


def add(path, *epochs, rows=ROWS, scale=1):
    """Add epochs whose maps have the epoch's grey value."""
    for epoch in epochs:
        add_epoch(path, epoch, column(255, rows), column(scale * epoch, rows), "attention")
    return path


def shown(path):
    """Return the grey value of each column by epoch, with that of the images as epoch 0."""
    with Image.open(path) as sheet:
        columns = cut_columns(sheet, heading=True)
        epochs = [0, *json.loads(sheet.info["epochs"])]
    return {epoch: part.getpixel((80, 80))[0] for epoch, part in zip(epochs, columns, strict=True)}


def test_sheet__a_column_for_each_epoch(tmp_path):
    path = add(tmp_path / "sheet.png", 2, 4, 6)
    assert shown(path) == {0: 255, 2: 2, 4: 4, 6: 6}
    with Image.open(path) as sheet:
        assert sheet.size == (GAP + 4 * (PANEL + GAP), 40 + ROWS * (PANEL + GAP))
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_sheet__a_resumed_training_replaces_what_it_repeats(tmp_path):
    path = add(tmp_path / "sheet.png", 1, 2, 3, 4)
    assert shown(add(path, 3, scale=10)) == {0: 255, 1: 1, 2: 2, 3: 30}


def test_sheet__many_epochs_keep_the_first_the_last_and_evenly_spread_ones(tmp_path):
    epochs = list(shown(add(tmp_path / "sheet.png", *range(1, 41), rows=1)))[1:]
    assert len(epochs) == MOST
    assert (epochs[0], epochs[-1]) == (1, 40)
    gaps = [after - before for before, after in itertools.pairwise(epochs)]
    assert max(gaps) <= 8


@pytest.mark.parametrize("damage", ["cut", "text", "other rows", "no epochs"])
def test_sheet__a_file_that_does_not_fit_is_replaced(tmp_path, damage):
    path = add(tmp_path / "sheet.png", 1, 2)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("no picture")
    elif damage == "other rows":
        add(path, 1, 2, rows=3)
    else:
        Image.open(path).save(path)
    assert shown(add(path, 3)) == {0: 255, 3: 3}
