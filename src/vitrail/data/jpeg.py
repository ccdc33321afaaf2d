"""Decode JPEGs with libjpeg-turbo (simplejpeg): Pillow's pixels in less time."""

from contextlib import suppress
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    from simplejpeg import decode_jpeg as _decode_jpeg
    from simplejpeg import decode_jpeg_header as _decode_jpeg_header
except ImportError:  # there is no wheel for this platform; Pillow decodes the same pixels
    _decode_jpeg = _decode_jpeg_header = None

ORIENTATION = 0x0112
"""EXIF tag of the camera's orientation."""

_JPEG_START, _EXIF = b"\xff\xd8", b"Exif\0\0"
_MARKER, _APP1, _PIXELS = b"\xff", b"\xe1", b"\xda"
_MANY_PIXELS = 1 << 27


def decode_jpeg(data: bytes | memoryview) -> NDArray[np.uint8] | None:
    """Decode a JPEG with libjpeg-turbo, which gives Pillow's pixels in less time; None leaves it to Pillow.

    Pillow decodes CMYK, damaged files, enormous ones, and those that carry an orientation.
    """
    if _decode_jpeg is None or bytes(data[:2]) != _JPEG_START:
        return None
    data = bytes(data)  # no copy if it is bytes
    if _has_exif(data) and _recorded_orientation(data) != 1:
        return None
    try:
        height, width, colours, _ = _decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or _MANY_PIXELS):
            return None
        return _decode_jpeg(data, "RGB")
    except ValueError:  # Pillow decides whether the damage matters
        return None


def _has_exif(data: bytes) -> bool:
    """Return whether a JPEG has a segment of EXIF entries before its pixels; also true if its segments are damaged."""
    place = len(_JPEG_START)
    while data[place : place + 1] == _MARKER and data[place + 1 : place + 2] != _PIXELS:
        if data[place + 1 : place + 2] == _APP1 and data[place + 4 : place + 10] == _EXIF:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data[place : place + 2] != _MARKER + _PIXELS


def _recorded_orientation(data: bytes) -> int:
    """Return the orientation in a JPEG's EXIF entries; 0 if it cannot be read."""
    with suppress(Exception), Image.open(BytesIO(data)) as image:  # Pillow raises many kinds of exceptions for EXIF
        return int(image.getexif().get(ORIENTATION, 1))
    return 0
