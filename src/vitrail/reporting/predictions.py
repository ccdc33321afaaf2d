"""Files of predictions (CSV, JSON lines, Parquet), and pictures with their predictions.

Shapes: K most likely classes of an image.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vitrail.errors import ConfigError
from vitrail.reporting.tables import describe
from vitrail_runtime.names import readable

_SIDE, _LINE, _MARGIN = 480, 22, 8  # pixels
_PARQUET_ROWS = 1024  # rows that are in memory at a time

WriteRow = Callable[[Sequence[str | float], Mapping[str, Any]], object]
"""Writes a row, given as the cells of a table and as the object of a line of JSON."""


@contextmanager
def prediction_writer(path: Path, top_k: int) -> Iterator[Callable[[str, Sequence[str], Sequence[float]], None]]:
    """Open a file of predictions, and yield a function that writes image, classes (K) and probabilities (K).

    The columns are `image`, then `class_1`, `name_1`, `probability_1` and so on; `name` is the readable name of
    ImageNet's classes. A line of JSON has `image` and `predictions`, a list of `class`, `name` and `probability`.

    Args:
        path: as in `table_writer`.
        top_k: K.

    Raises:
        ConfigError: as `table_writer`.
    """
    kinds = {"class": str, "name": str, "probability": float}
    columns = {f"{name}_{rank}": kind for rank in range(1, top_k + 1) for name, kind in kinds.items()}
    with table_writer(path, {"image": str, **columns}) as write_row:

        def write(image: str, classes: Sequence[str], probabilities: Sequence[float]) -> None:
            best = [*zip(classes, map(describe, classes), probabilities, strict=True)]
            objects = [dict(zip(kinds, (name, shown, round(share, 6)), strict=True)) for name, shown, share in best]
            file = readable(image)
            write_row([file, *(value for cells in best for value in cells)], {"image": file, "predictions": objects})

        yield write


@contextmanager
def table_writer(path: Path, columns: Mapping[str, type]) -> Iterator[WriteRow]:
    """Open a table by the extension of its file, which has its name once it is complete.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`.
        columns: name and type of each column, `str` or `float`.

    Raises:
        ConfigError: as `check_format`, or the file cannot be written.
    """
    check_format(path)
    unfinished = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _OPEN[path.suffix](unfinished, columns) as write_row:
            yield write_row
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def _csv(path: Path, columns: Mapping[str, type]) -> Iterator[WriteRow]:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        yield lambda cells, _: rows.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])


@contextmanager
def _jsonl(path: Path, _: Mapping[str, type]) -> Iterator[WriteRow]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda _, found: file.write(json.dumps(found) + "\n")


@contextmanager
def _parquet(path: Path, columns: Mapping[str, type]) -> Iterator[WriteRow]:
    import pyarrow
    from pyarrow import parquet

    types = {float: pyarrow.float32(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as file:

        def write_row(cells: Sequence[str | float], _: Mapping[str, Any]) -> None:
            waiting.append(dict(zip(columns, cells, strict=True)))
            if len(waiting) == _PARQUET_ROWS:
                flush()

        def flush() -> None:
            file.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        yield write_row
        if waiting:
            flush()


def check_format(path: Path) -> None:
    """Check that predictions can be written to a file of this extension.

    Raises:
        ConfigError: the extension is unknown, or pyarrow is missing.
    """
    if path.suffix not in _OPEN:
        raise ConfigError(f"out={path}: must end with one of {', '.join(_OPEN)}.")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError(f"out={path}: needs pyarrow; run pip install 'vitrail[parquet]'.")


_OPEN = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def prediction_picture(image: Image.Image, classes: Sequence[str], probabilities: Sequence[float]) -> Image.Image:
    """Draw an image of any size with its most likely classes (K) below it, each with a bar of its probability."""
    picture = image.copy()
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    height = 2 * _MARGIN + _LINE * len(classes)
    sheet = Image.new("RGB", (_SIDE, picture.height + height), "white")
    sheet.paste(picture, ((_SIDE - picture.width) // 2, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for rank, (name, share) in enumerate(zip(classes, probabilities, strict=True)):
        top = picture.height + _MARGIN + rank * _LINE
        draw.rectangle((_MARGIN, top, _MARGIN + share * (_SIDE - 2 * _MARGIN), top + _LINE - 4), fill="#bcd9f5")
        draw.text((_MARGIN + 4, top), f"{share:6.1%}  {_fitting(describe(name), draw, font)}", fill="black", font=font)
    return sheet


def above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Return two pictures in one, the first above the second, both on the left."""
    sheet = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height))
    return sheet


def _fitting(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """Shorten a text to the width of a picture."""
    text = text.replace("\n", " ")
    while text and draw.textlength(text, font=font) > _SIDE - 100:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def picture_names(images: Sequence[str]) -> Iterator[str]:
    """Yield the relative path of each picture, without extension: that of its image below the images' common folder.

    Images that differ only in their extension get a number.
    """
    parents = {Path(image).absolute().parent for image in images}
    common = Path(os.path.commonpath(parents)) if parents else Path()
    seen: Counter[str] = Counter()
    for image in images:
        name = str(Path(image).absolute().relative_to(common).with_suffix(""))
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"
