"""Sheets of maps over the epochs of a training: a row per image and a column per epoch, in one PNG file that grows."""

import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitrail.reporting.panels import GAP, PANEL, PanelSheet, cut_columns

MOST = 12  # columns


def add_epoch(path: Path, epoch: int, images: Image.Image, maps: Image.Image, heading: str) -> Image.Image:
    """Add the maps of an epoch to a sheet, write it atomically, and return it.

    Columns of this epoch and of later ones, which a resumed training repeats, are replaced. Of more than `MOST` epochs,
    the first, the last and evenly spread ones are kept.

    Args:
        path: PNG file of the sheet; its metadata names the epochs.
        epoch: epoch, from 1.
        images: the images, one below the other, as `cut_columns` returns them.
        maps: their maps, in the same way.
        heading: line above the titles.
    """
    columns = {known: column for known, column in _columns(path, maps.height).items() if known < epoch}
    columns[epoch] = maps
    while len(columns) > MOST:
        epochs = list(columns)
        gaps = {epochs[index]: epochs[index + 1] - epochs[index - 1] for index in range(1, len(epochs) - 1)}
        del columns[min(gaps, key=gaps.__getitem__)]
    sheet = PanelSheet(["image", *(f"epoch {epoch}" for epoch in columns)], maps.height // (PANEL + GAP), heading)
    for number, column in enumerate((images, *columns.values())):
        sheet.paste_column(number, column)
    info = PngInfo()
    info.add_text("epochs", json.dumps(list(columns)))
    unfinished = path.with_name(f".{path.name}")
    sheet.image.save(unfinished, format="PNG", pnginfo=info)
    unfinished.replace(path)
    return sheet.image


def _columns(path: Path, height: int) -> dict[int, Image.Image]:
    """Return the columns of a sheet by epoch; none if there is no such file, or it is damaged or of other images."""
    try:
        with Image.open(path) as file:
            epochs = json.loads(file.info["epochs"])
            columns = cut_columns(file.convert("RGB"), heading=True)[1:]
    except (OSError, KeyError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a damaged PNG
        return {}
    fits = len(columns) == len(epochs) and all(column.height == height for column in columns)
    return dict(zip(epochs, columns, strict=True)) if fits else {}
