"""Values with more than 8 bits per channel, and the range of them that is shown from black to white."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ValueRange = tuple[float, float]
"""Values that become black and white in images with more than 8 bits per channel."""

TYPE_RANGES: dict[str, ValueRange] = {"u": (0.0, 65535.0), "f": (0.0, 1.0)}
"""Value ranges by numpy's kind of type, for a data set in whose sample no image has more than 8 bits."""

_FLOAT_WHITES = (1.0, 255.0, 65535.0)
_INTEGER_WHITES = tuple(2.0**bits - 1 for bits in (8, 10, 12, 14, 16))  # bits of usual sensors
_WIDE_WHITES = tuple(2.0**bits - 1 for bits in (8, 10, 12, 14, 15, 16, 24, 31))
_HALF_STEP = 0.5  # of 255: a value that rounds to black or white is not outside


class OutsideRangeError(Exception):
    """A value lies outside the value range."""


def scaled(
    values: NDArray[Any], value_range: ValueRange | Literal["type"] | None, transparent: Any = None
) -> Image.Image:
    """Scale values (H, W) or (H, W, 3) from `value_range`, and alpha (H, W, 4) from 16 bits, to an 8-bit image.

    A transparent value becomes white.
    """
    colours = values[..., :3] if values.ndim == 3 else values
    if value_range == "type":
        value_range = TYPE_RANGES.get(values.dtype.kind)
        if value_range is None:
            raise OutsideRangeError(
                "its integers do not show which are black and white; set data.value_range=[low, high]."
            )
    if value_range is None:
        value_range = _own_range(colours)
    low, high = value_range
    scaled = (colours.astype(np.float64) - low) * (255 / (high - low))
    outside = ~((scaled >= -_HALF_STEP) & (scaled <= 255 + _HALF_STEP))  # also true for NaN
    if outside.any():
        raise OutsideRangeError(
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


def _own_range(values: NDArray[Any]) -> ValueRange:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    white = white_of(low, high, values.dtype.kind)
    if white is None:
        raise OutsideRangeError(
            f"values from {low:g} to {high:g} do not show which are black and white; set data.value_range=[low, high]."
        )
    return 0.0, white


def white_of(low: float, high: float, kind: str) -> float | None:
    """Return the smallest usual white that holds all values: `kind` is numpy's (f float, u unsigned, i signed)."""
    whites = {"f": _FLOAT_WHITES, "u": _INTEGER_WHITES}.get(kind, _WIDE_WHITES)
    rounding = _HALF_STEP / 255 if kind == "f" else 0.0
    white = next((white for white in whites if high <= white * (1 + rounding)), None)
    return white if white is not None and low >= -white * rounding else None
