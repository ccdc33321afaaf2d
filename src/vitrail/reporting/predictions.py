"""Files of predictions (CSV, JSON lines, Parquet), and pictures with their predictions.

Shapes: K most likely classes of an image.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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

Write = Callable[[str, Sequence[str], Sequence[float]], None]
"""Writes image, classes (K) and probabilities (K)."""


@contextmanager
def prediction_writer(path: Path, top_k: int) -> Iterator[Write]:
    """Open a file of predictions by its extension; it has its name once it is complete.

    The columns are `image`, then `class_1`, `name_1`, `probability_1` and so on; `name` is the readable name of
    ImageNet's classes. A line of JSON has `image` and `predictions`, a list of `class`, `name` and `probability`.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`.
        top_k: K.

    Raises:
        ConfigError: as `check_format`, or the file cannot be written.
    """
    check_format(path)
    unfinished = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _OPEN[path.suffix](unfinished, top_k) as write:
            yield write
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def _csv(path: Path, top_k: int) -> Iterator[Write]:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(_columns(top_k))

        def write(image: str, classes: Sequence[str], probabilities: Sequence[float]) -> None:
            cells = zip(classes, map(describe, classes), (f"{share:.6f}" for share in probabilities), strict=True)
            rows.writerow((readable(image), *(value for cell in cells for value in cell)))

        yield write


@contextmanager
def _jsonl(path: Path, _: int) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(image: str, classes: Sequence[str], probabilities: Sequence[float]) -> None:
            best = [
                {"class": name, "name": describe(name), "probability": round(share, 6)}
                for name, share in zip(classes, probabilities, strict=True)
            ]
            file.write(json.dumps({"image": readable(image), "predictions": best}) + "\n")

        yield write


@contextmanager
def _parquet(path: Path, top_k: int) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    columns = _columns(top_k)
    types = {"probability": pyarrow.float32()}
    schema = pyarrow.schema([(name, types.get(name.partition("_")[0], pyarrow.string())) for name in columns])
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as file:

        def write(image: str, classes: Sequence[str], probabilities: Sequence[float]) -> None:
            cells = zip(classes, map(describe, classes), probabilities, strict=True)
            clean = readable(image)
            row = (clean, *(value for cell in cells for value in cell))
            waiting.append(dict(zip(columns, row, strict=True)))
            if len(waiting) == _PARQUET_ROWS:
                flush()

        def flush() -> None:
            file.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        yield write
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


def _columns(top_k: int) -> list[str]:
    return ["image", *(f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("class", "name", "probability"))]


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


def overlay_names(images: Sequence[str]) -> Iterator[Path]:
    """Yield the relative path of each picture: that of its image below the images' common folder, as JPEG.

    Images that differ only in their extension get a number.
    """
    parents = {Path(image).absolute().parent for image in images}
    common = Path(os.path.commonpath(parents)) if parents else Path()
    seen: Counter[str] = Counter()
    for image in images:
        name = Path(image).absolute().relative_to(common).with_suffix(".jpg")
        seen[str(name)] += 1
        count = seen[str(name)]
        yield name if count == 1 else name.with_stem(f"{name.stem}_{count}")
