"""Decode any image file that Pillow supports to RGB, as an image viewer shows it.

8-bit images need no scaling. Others (16-bit grey and colour, 32-bit integers, floats) do not say what white is, so a
data set has one value range for all of them (`vitrail.data.bit_depth`), and values outside it are errors.
"""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitrail.data.bit_depth import OutsideRangeError, ValueRange, scaled
from vitrail.data.jpeg import ORIENTATION, decode_jpeg
from vitrail.errors import ImageError
from vitrail.types import Picture

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
_QUARTER_TURNS = (5, 6, 7, 8)
# Entries of a PNG that hold the orientation. Pillow decodes the pixels to look for entries behind them.
_EXIF_OF_PNG = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
# Formats whose pixels Pillow cannot read on its own: it only recognises them, or needs another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


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


class Header(NamedTuple):
    """What an image file says before its pixels."""

    size: tuple[int, int]
    """(height, width) of the upright image, in pixels."""
    is_turned: bool
    """Whether the camera's orientation turns or mirrors the image."""


def read_header(path: str | Path) -> Header:
    """Return the size and orientation of an image file without decoding it.

    Raises:
        ImageError: the file is missing or not an image; the message names the file.
    """
    try:
        with Image.open(path) as image:
            is_plain = image.format == "PNG" and not _EXIF_OF_PNG & image.info.keys()
            orientation = 1 if is_plain else _orientation(image)
            size = image.height, image.width
            if orientation in _QUARTER_TURNS and image.format != "TIFF":  # Pillow gives the upright size of TIFFs
                size = size[::-1]
            return Header(size, orientation in _UPRIGHT)
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for damaged files
        raise ImageError(f"{path}: not a readable image ({_reason(error)}).") from error


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
                upright = _upright(scaled(colours, value_range, image.info.get("transparency")), image)
            return _to_rgb(upright, value_range)
    except OutsideRangeError as error:
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
    except OutsideRangeError as error:
        raise ImageError(f"the image {error}") from None


def _upright(image: Image.Image, original: Image.Image | None = None) -> Image.Image:
    """Apply the orientation that the camera recorded in `original`, by default the image itself."""
    orientation = _orientation(original or image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    """Return the orientation in the EXIF entries; 1 without one. Other entries, valid or not, do not matter."""
    with suppress(Exception):  # EXIF is written by many programs; Pillow raises many kinds of exceptions for it
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


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
    return scaled(np.asarray(image), value_range, image.info.get("transparency"))


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


def high_bit_depth_values(path: Path) -> NDArray[Any] | None:
    """Return the values (H, W) or (H, W, 3) of an image with more than 8 bits; None, without decoding, for others."""
    try:
        with Image.open(path) as image:
            if (colours := _sixteen_bit_colours(lambda: path, image)) is not None:
                return colours[..., :3]
            return np.asarray(image) if _has_high_bit_depth(image) else None
    except Exception:
        return None
