"""Sheets of maps over the epochs of a training: a row per image and a column per epoch, in one PNG file that grows.

Columns of the epoch that is added and of later ones, which a resumed training repeats, are replaced. Of more than
`MOST` epochs, the first, the last and evenly spread ones are kept. Files are written atomically.

Shapes: H x W cells of a grid.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitrail.reporting.class_grids import ClassGrid, class_overlay, draw_legend, main_classes
from vitrail.reporting.colours import class_colours
from vitrail.reporting.panels import PanelSheet, cut_panels

MOST = 12  # columns
_DAMAGED = (OSError, KeyError, ValueError, SyntaxError)  # Pillow raises SyntaxError for a damaged PNG
_Column = TypeVar("_Column")


def add_epoch(path: Path, epoch: int, images: Sequence[Image.Image], maps: Sequence[Image.Image], heading: str) -> None:
    """Add the maps of an epoch to a sheet.

    Args:
        path: PNG file of the sheet; its metadata names the epochs.
        epoch: epoch, from 1.
        images: one panel per image.
        maps: one panel per image, its map.
        heading: line above the titles.
    """
    columns = _with_epoch(_panels(path, len(images)), epoch, list(maps))
    sheet = PanelSheet(_titles(columns), len(images), heading)
    for row, panels in enumerate(zip(images, *columns.values(), strict=True)):
        sheet.paste(row, panels)
    _save(sheet, path, {"epochs": json.dumps(list(columns))})


def add_class_epoch(
    path: Path,
    epoch: int,
    images: Sequence[Image.Image],
    grids: Sequence[ClassGrid],
    names: Sequence[str],
    heading: str,
) -> None:
    """Add the grids of classes of an epoch to a sheet.

    A class has one colour in the whole sheet. The legend of a row gives shares and probabilities of the newest epoch.

    Args:
        path: PNG file of the sheet; its metadata has the grids of all epochs, so that they can be coloured anew.
        epoch: epoch, from 1.
        images: one panel per image.
        grids: one per image.
        names: class names.
        heading: line above the titles.
    """
    columns = _with_epoch(_grids(path, len(images)), epoch, list(grids))
    rows = list(zip(*columns.values(), strict=True))
    listed = [main_classes(*row) for row in rows]
    colours = class_colours((index for classes in listed for index in classes), len(names))
    sheet = PanelSheet(_titles(columns), len(images), heading, legends=True)
    for number, (image, row) in enumerate(zip(images, rows, strict=True)):
        sheet.paste(number, [image, *(class_overlay(image, grid, colours) for grid in row)])
        draw_legend(sheet, number, row[-1], {index: colours[index] for index in listed[number]}, names)
    stored = {f"epoch {known}": json.dumps([_packed(grid) for grid in column]) for known, column in columns.items()}
    _save(sheet, path, {"epochs": json.dumps(list(columns)), **stored})


def _with_epoch(columns: Mapping[int, _Column], epoch: int, column: _Column) -> dict[int, _Column]:
    """Return the columns to show by epoch."""
    shown = {known: earlier for known, earlier in columns.items() if known < epoch} | {epoch: column}
    while len(shown) > MOST:
        epochs = list(shown)
        gaps = {epochs[index]: epochs[index + 1] - epochs[index - 1] for index in range(1, len(epochs) - 1)}
        del shown[min(gaps, key=gaps.__getitem__)]
    return shown


def _titles(columns: Mapping[int, object]) -> list[str]:
    return ["image", *(f"epoch {epoch}" for epoch in columns)]


def _save(sheet: PanelSheet, path: Path, texts: Mapping[str, str]) -> None:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text, zip=True)
    unfinished = path.with_name(f".{path.name}")
    sheet.image.save(unfinished, format="PNG", pnginfo=info)
    unfinished.replace(path)


def _panels(path: Path, rows: int) -> dict[int, list[Image.Image]]:
    """Return the panels of a sheet by epoch; none if there is no such file, or it is damaged or of other images."""
    try:
        with Image.open(path) as file:
            epochs = json.loads(file.info["epochs"])
            columns = cut_panels(file.convert("RGB"), heading=True)[1:]
    except _DAMAGED:
        return {}
    fits = len(columns) == len(epochs) and all(len(column) == rows for column in columns)
    return dict(zip(epochs, columns, strict=True)) if fits else {}


def _grids(path: Path, rows: int) -> dict[int, list[ClassGrid]]:
    """Return the grids of a sheet by epoch; none in the cases of `_panels`."""
    try:
        with Image.open(path) as file:
            file.load()
            columns = {
                epoch: [_unpacked(grid) for grid in json.loads(file.info[f"epoch {epoch}"])]
                for epoch in json.loads(file.info["epochs"])
            }
    except _DAMAGED:
        return {}
    return columns if all(len(column) == rows for column in columns.values()) else {}


def _packed(grid: ClassGrid) -> list[object]:
    """Return what JSON can hold: shape, classes as 32-bit numbers, probabilities as shares of 255."""
    probability = (255 * grid.probability).round().astype(np.uint8)
    parts = (grid.best.astype("<i4"), probability)
    return [list(grid.best.shape), *(base64.b64encode(part.tobytes()).decode() for part in parts)]


def _unpacked(packed: Sequence[object]) -> ClassGrid:
    shape, best, probability = packed
    classes, shares = (base64.b64decode(str(part)) for part in (best, probability))
    return ClassGrid(
        np.frombuffer(classes, "<i4").astype(np.int64).reshape(shape),  # type: ignore[call-overload]
        (np.frombuffer(shares, np.uint8) / np.float32(255)).reshape(shape),  # type: ignore[call-overload]
    )
