"""What the kernels share."""

import inspect
from typing import Any

import triton
import triton.language as tl

_POINTERS = {"pixels", "source", "numbers", "out", "first", "weights", "tables", "means", "deviations"}


def kernel(function: Any) -> Any:
    """Compile a kernel once for all values of its numbers: places and sizes differ between batches."""
    numbers = [name for name in inspect.signature(function).parameters if name not in _POINTERS and not name.isupper()]
    return triton.jit(function, do_not_specialize=numbers)


@triton.jit
def number_at(numbers, place):
    """Return a whole number of the views."""
    return tl.load(numbers + place).to(tl.int64)


@triton.jit
def image_at(numbers, images_at, sources_at, area, side, FLAT: tl.constexpr):
    """Return first pixel, height and width of this program's image.

    Images of a batch are `area` pixels apart and `side` wide; with FLAT each has its own place and size.
    """
    row = number_at(numbers, images_at + tl.program_id(0))
    if FLAT:
        at = sources_at + 3 * row
        return number_at(numbers, at), number_at(numbers, at + 1), number_at(numbers, at + 2)
    return row * area, (area // side).to(tl.int64), side.to(tl.int64)


@triton.jit
def rounded_off(value):
    """Return a value between 0 and 255, cut off."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def clip(place, size):
    """Return the nearest place inside an image of `size`."""
    return tl.minimum(tl.maximum(place, 0), size - 1)
