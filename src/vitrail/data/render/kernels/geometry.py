"""Kernel of affine operations, with the kernels of Pillow's transforms (a = -1, unlike its resize)."""

import triton
import triton.language as tl

from vitrail.data.render.kernels.common import clip, image_at, kernel, rounded_off


@triton.jit
def _between(first, second, share):
    return first + (second - first) * share


@triton.jit
def _cubic(first, second, third, fourth, share):
    """Interpolate with a = -1."""
    slope = third - first
    curve = 2 * (first - second) + third - fourth
    cubic = second - first - third + fourth
    return second + share * (slope + share * (curve + share * cubic))


@triton.jit
def _cubic_row(row, left, width, share, mask):
    """Interpolate between four neighbours of a row."""
    first = tl.load(row + clip(left - 1, width) * 3, mask, 0).to(tl.float64)
    second = tl.load(row + clip(left, width) * 3, mask, 0).to(tl.float64)
    third = tl.load(row + clip(left + 1, width) * 3, mask, 0).to(tl.float64)
    fourth = tl.load(row + clip(left + 2, width) * 3, mask, 0).to(tl.float64)
    return _cubic(first, second, third, fourth, share)


@triton.jit
def _linear_row(row, left, width, share, mask):
    first = tl.load(row + clip(left, width) * 3, mask, 0).to(tl.float64)
    second = tl.load(row + clip(left + 1, width) * 3, mask, 0).to(tl.float64)
    return _between(first, second, share)


@kernel
def affine(
    pixels,
    numbers,
    source,
    images_at,
    sources_at,
    values_at,
    area,
    side,
    apart,
    red,
    green,
    blue,
    CUBIC: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take each pixel (x, y) from (ax + by + c, dx + ey + f) of the copies in `source`; outside it has the fill colour.

    The values of an image are a to f.
    """
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    values = numbers + values_at + 6 * tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < height * width
    y = (index // width).to(tl.float64) + 0.5
    x = (index % width).to(tl.float64) + 0.5
    from_x = tl.load(values) * x + tl.load(values + 1) * y + tl.load(values + 2)
    from_y = tl.load(values + 3) * x + tl.load(values + 4) * y + tl.load(values + 5)
    is_inside = (from_x >= 0) & (from_x < width.to(tl.float64)) & (from_y >= 0) & (from_y < height.to(tl.float64))
    read = mask & is_inside
    from_x, from_y = from_x - 0.5, from_y - 0.5
    floor_x, floor_y = tl.floor(from_x), tl.floor(from_y)
    dx, dy = from_x - floor_x, from_y - floor_y  # results are cut off, so that 128 may be 127.9 in float32
    left, top = tl.where(read, floor_x, 0.0).to(tl.int64), tl.where(read, floor_y, 0.0).to(tl.int64)
    own = source + tl.program_id(0).to(tl.int64) * apart * 3
    for channel in tl.static_range(3):
        base = own + channel
        row = base + clip(top, height) * width * 3
        below = base + clip(top + 1, height) * width * 3
        if CUBIC:
            above = base + clip(top - 1, height) * width * 3
            last = base + clip(top + 2, height) * width * 3
            made = _cubic(
                _cubic_row(above, left, width, dx, read),
                _cubic_row(row, left, width, dx, read),
                _cubic_row(below, left, width, dx, read),
                _cubic_row(last, left, width, dx, read),
                dy,
            )
        else:
            made = _between(_linear_row(row, left, width, dx, read), _linear_row(below, left, width, dx, read), dy)
        fill = red if channel == 0 else (green if channel == 1 else blue)
        value = tl.where(is_inside, rounded_off(made).to(tl.int32), fill)
        tl.store(pixels + (start + index) * 3 + channel, value.to(tl.uint8), mask)
