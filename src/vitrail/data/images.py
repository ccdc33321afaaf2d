"""Decode any image file that Pillow supports to RGB, as an image viewer shows it.

8-bit images need no scaling. Others (16-bit grey and colour, 32-bit integers, floats) do not say what white is, so a
data set has one value range for all of them: `find_value_range` finds it, and values outside it are errors.
"""

import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitrail.data.jpeg import ORIENTATION, decode_jpeg
from vitrail.errors import ConfigError, ImageError
from vitrail.types import Picture

ValueRange = tuple[float, float]
"""Values that become black and white in images with more than 8 bits per channel."""

TYPE_RANGES: dict[str, ValueRange] = {"u": (0.0, 65535.0), "f": (0.0, 1.0)}
"""Value ranges by numpy's kind of type, for a data set in whose sample no image has more than 8 bits."""

_JPEG_ENDINGS = (".jpg", ".jpeg")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats whose pixels Pillow cannot read on its own: it only recognises them, or needs another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_FLOAT_WHITES = (1.0, 255.0, 65535.0)
_INTEGER_WHITES = tuple(2.0**bits - 1 for bits in (8, 10, 12, 14, 16))  # bits of usual sensors
_WIDE_WHITES = tuple(2.0**bits - 1 for bits in (8, 10, 12, 14, 15, 16, 24, 31))
_HALF_STEP = 0.5  # of 255: a value that rounds to black or white is not outside


@cache
def image_extensions() -> tuple[str, ...]:
    """Return the extensions (`.jpg`, ...) of all formats that the installed Pillow decodes."""
    decoded = {
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_DECODED
    }
    return tuple(sorted(decoded))


def load_image(path: str | Path, value_range: ValueRange | Literal["type"] | None = None) -> Image.Image:
    """Read `path` as an upright 8-bit RGB image of Pillow's; see `read_image`."""
    return as_image(read_image(path, value_range))


def read_image(path: str | Path, value_range: ValueRange | Literal["type"] | None = None) -> Picture:
    """Read `path` as an upright 8-bit RGB picture.

    The camera's orientation is applied, CMYK and palettes are converted, and transparent areas become white, as in most
    viewers. Values with more than 8 bits are scaled from `value_range`.

    Args:
        path: the file.
        value_range: black and white of images with more than 8 bits per channel; `type` for those of `TYPE_RANGES`;
            None finds it from this image alone.

    Returns:
        An array (H, W, 3) uint8, or Pillow's image; `as_image` and `as_array` convert either.

    Raises:
        ImageError: the file is missing, truncated, not an image, or has a value outside `value_range`; the message
            names the file.
    """
    if str(path).lower().endswith(_JPEG_ENDINGS):
        with suppress(OSError):  # reported below
            return decode_image(Path(path).read_bytes(), str(path), value_range)
    return _decoded(lambda: path, str(path), value_range)


def decode_image(
    data: bytes | memoryview, name: str, value_range: ValueRange | Literal["type"] | None = None
) -> Picture:
    """Decode the bytes of an image file as `read_image` does.

    Args:
        data: the bytes.
        name: name of the image in messages.
        value_range: as in `read_image`.

    Raises:
        ImageError: as `read_image`; the message starts with `name`.
    """
    pixels = decode_jpeg(data)
    return _decoded(lambda: BytesIO(data), name, value_range) if pixels is None else pixels


def as_image(picture: Picture) -> Image.Image:
    """Return a picture as Pillow's image."""
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def as_array(picture: Picture) -> NDArray[np.uint8]:
    """Return an RGB picture as array (H, W, 3)."""
    return picture if isinstance(picture, np.ndarray) else np.asarray(picture)


def size_of(picture: Picture) -> tuple[int, int]:
    """Return (height, width) of a picture in pixels."""
    if isinstance(picture, np.ndarray):
        return picture.shape[0], picture.shape[1]
    return picture.height, picture.width


def _decoded(
    file: Callable[[], str | Path | IO[bytes]], name: str, value_range: ValueRange | Literal["type"] | None
) -> Image.Image:
    """Decode an image; `file` returns its path, or a new stream of its bytes at each call."""
    try:
        with Image.open(file()) as image:
            colours = _sixteen_bit_colours(file, image)
            image.load()
            upright = _upright(image)
            if colours is not None:
                upright = _upright(_scaled(colours, value_range, image.info.get("transparency")), image)
            return _to_rgb(upright, value_range)
    except _OutsideError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for damaged files
        raise ImageError(f"{name}: not a readable image ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """Return in a few words why an image cannot be read; the message names the file already."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):  # its text ends with the path, or an address in memory
        return "cannot identify image file"
    return str(error).rstrip(".") or type(error).__name__


def to_rgb(picture: Picture, value_range: ValueRange | Literal["type"] | None = "type") -> Picture:
    """Convert a picture of any mode to 8-bit RGB, as `read_image` does.

    Raises:
        ImageError: a value is outside `value_range`, or an array is not (H, W, 3) uint8.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(f"the image is an array {picture.shape} of {picture.dtype}; make it (H, W, 3) uint8.")
        return picture
    if picture.mode == "RGB":
        return picture
    try:
        return _to_rgb(picture, value_range)
    except _OutsideError as error:
        raise ImageError(f"the image {error}") from None


def find_value_range(paths: Iterable[Path]) -> tuple[ValueRange | None, int]:
    """Find the value range of a data set from a sample of its files.

    The range starts at 0. It ends at 1, 255 or 65535 for floats, and at the largest value of 8, 10, 12, 14 or 16 bits
    for integers: the smallest that holds all values of the sample.

    Args:
        paths: files of the data set; unreadable ones are skipped.

    Returns:
        The range, and the number of files with more than 8 bits; None and 0 if there are none.

    Raises:
        ConfigError: there is no such range; the message names a file and `data.value_range`.
    """
    found: dict[str, tuple[float, float, Path]] = {}
    count = 0
    for path in paths:
        values = _high_bit_depth_values(path)
        if values is None or not np.isfinite(values).all():
            continue
        count += 1
        kind, low, high = values.dtype.kind, float(values.min()), float(values.max())
        before = found.get(kind, (low, high, path))
        found[kind] = (min(low, before[0]), max(high, before[1]), path if high >= before[1] else before[2])
    if not found:
        return None, 0
    if len({"f" if kind == "f" else "i" for kind in found}) > 1:
        files = " and ".join(str(path) for *_, path in found.values())
        raise ConfigError(
            f"data.value_range: there are images of integers and of floats ({files}); set it to [low, high]."
        )
    low, high = min(item[0] for item in found.values()), max(item[1] for item in found.values())
    white = _white(low, high, "i" if "i" in found else next(iter(found)))
    if white is None:
        path = max(found.values(), key=lambda item: item[1])[2]
        raise ConfigError(
            f"data.value_range: values from {low:g} to {high:g} (in {path}, for example) do not say what is black and"
            " white; set it to [low, high]."
        )
    return (0.0, white), count


class _OutsideError(Exception):
    """A value lies outside the value range."""


def _upright(image: Image.Image, original: Image.Image | None = None) -> Image.Image:
    """Apply the orientation that the camera recorded in `original`, by default the image itself.

    Other EXIF entries, valid or not, do not matter.
    """
    orientation: Any = None
    with suppress(Exception):  # EXIF is written by many programs; Pillow raises many kinds of exceptions for it
        orientation = int((original or image).getexif().get(ORIENTATION, 1))
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _has_high_bit_depth(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits per value."""
    return image.mode.startswith("I") or image.mode == "F"


def _to_rgb(image: Image.Image, value_range: ValueRange | Literal["type"] | None) -> Image.Image:
    if _has_high_bit_depth(image):
        image = _to_eight_bits(image, value_range)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image, value_range: ValueRange | Literal["type"] | None) -> Image.Image:
    return _scaled(np.asarray(image), value_range, image.info.get("transparency"))


def _scaled(
    values: NDArray[Any], value_range: ValueRange | Literal["type"] | None, transparent: Any = None
) -> Image.Image:
    """Scale values (H, W) or (H, W, 3) from `value_range`, and alpha (H, W, 4) from 16 bits, to an 8-bit image.

    A transparent value becomes white.
    """
    colours = values[..., :3] if values.ndim == 3 else values
    if value_range == "type":
        value_range = TYPE_RANGES.get(values.dtype.kind)
        if value_range is None:
            raise _OutsideError("its integers do not say what is black and white; set data.value_range=[low, high].")
    if value_range is None:
        value_range = _own_range(colours)
    low, high = value_range
    scaled = (colours.astype(np.float64) - low) * (255 / (high - low))
    outside = ~((scaled >= -_HALF_STEP) & (scaled <= 255 + _HALF_STEP))  # also true for NaN
    if outside.any():
        raise _OutsideError(
            f"has the value {colours[outside][0]:g}, outside of data.value_range=[{low:g}, {high:g}]; set the range to"
            " that of your images, or repair the file."
        )
    eight = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    if isinstance(transparent, int) and values.ndim == 2:
        eight[values == transparent] = 255
    elif isinstance(transparent, tuple) and values.shape[2:] == (3,):
        eight[(values == np.array(transparent)).all(-1)] = 255
    if values.shape[2:] == (4,):
        eight = np.dstack([eight, (values[..., 3] >> 8).astype(np.uint8)])
    return Image.fromarray(eight)


def _sixteen_bit_colours(file: Callable[[], str | Path | IO[bytes]], image: Image.Image) -> NDArray[np.uint16] | None:
    """Return 16-bit colours (H, W, 3), or (H, W, 4) with alpha, of which Pillow keeps only the high bytes.

    The low bytes are those that Pillow reads if it is told the opposite byte order. None if the image has no 16-bit
    colours.
    """
    match = re.fullmatch(r"(RGBA?;16)([LBN])", _raw_mode(image))
    if match is None:
        return None
    native = "L" if sys.byteorder == "little" else "B"
    swapped = match[1] + {"L": "B", "B": "L"}[match[2] if match[2] != "N" else native]
    with Image.open(file()) as low:
        tiles: Any = low.tile
        low.tile = [
            tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])) for tile in tiles
        ]
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)


def _raw_mode(image: Image.Image) -> str:
    """Return the layout of the pixels in the file, in Pillow's words; empty if it is not known."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _own_range(values: NDArray[Any]) -> ValueRange:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    white = _white(low, high, values.dtype.kind)
    if white is None:
        raise _OutsideError(
            f"values from {low:g} to {high:g} do not say what is black and white; set data.value_range=[low, high]."
        )
    return 0.0, white


def _white(low: float, high: float, kind: str) -> float | None:
    """Return the smallest usual white that holds all values: `kind` is numpy's (f float, u unsigned, i signed)."""
    whites = {"f": _FLOAT_WHITES, "u": _INTEGER_WHITES}.get(kind, _WIDE_WHITES)
    rounding = _HALF_STEP / 255 if kind == "f" else 0.0
    white = next((white for white in whites if high <= white * (1 + rounding)), None)
    return white if white is not None and low >= -white * rounding else None


def _high_bit_depth_values(path: Path) -> NDArray[Any] | None:
    """Return the values of an image with more than 8 bits per channel; None, without decoding, for others."""
    try:
        with Image.open(path) as image:
            if (colours := _sixteen_bit_colours(lambda: path, image)) is not None:
                return colours[..., :3]
            return np.asarray(image) if _has_high_bit_depth(image) else None
    except Exception:
        return None
