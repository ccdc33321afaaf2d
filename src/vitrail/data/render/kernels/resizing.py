"""Kernels that crop and resize, with Pillow's fixed-point coefficients."""

import triton
import triton.language as tl

from vitrail.data.render.kernels.common import kernel, number_at

_BOX, _BILINEAR, _HAMMING, _BICUBIC, _LANCZOS = (tl.constexpr(number) for number in range(5))  # as in `plan.KERNELS`


@triton.jit
def _sinc(x):
    angle = x * 3.141592653589793
    return tl.where(x == 0, 1.0, tl.sin(angle) / tl.where(x == 0, 1.0, angle))


@triton.jit
def _weight(x, number):
    """Return Pillow's kernel of this number at distances x."""
    size = tl.abs(x)
    made = tl.maximum(1.0 - size, 0.0)
    if number == _BOX:
        made = tl.where((x > -0.5) & (x <= 0.5), 1.0, 0.0).to(tl.float64)
    if number == _HAMMING:  # Pillow has the window's coefficients in single precision
        window = 0.5400000214576721 + 0.46000000834465027 * tl.cos(x * 3.141592653589793)
        made = tl.where(size < 1, _sinc(x) * window, 0.0)
    if number == _BICUBIC:  # a = -0.5
        far = (((size - 5) * size + 8) * size - 4) * -0.5
        made = tl.where(size < 1, (1.5 * size - 2.5) * size * size + 1, tl.where(size < 2, far, 0.0))
    if number == _LANCZOS:
        made = tl.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)
    return made


@kernel
def coefficients(
    numbers, first, weights, boxes_at, flips_at, height, width, side, taps, TAPS: tl.constexpr, PLACES: tl.constexpr
):
    """Write the first source pixel and the coefficients of each row and column of the crops.

    Programs: image, axis (0 for rows), block of PLACES rows or columns.

    Args:
        numbers: numbers of the views.
        first: (2, images, side) int32.
        weights: (2, images, side, taps) int32: whole multiples of 1 / 2**22.
        boxes_at, flips_at: places of the plan's arrays.
        height, width: size of the result.
        side: the larger of both.
        taps: largest number of coefficients; TAPS is a power of two that is not smaller.
    """
    image, axis = tl.program_id(0), tl.program_id(1)
    box = numbers + boxes_at + 6 * image
    length = tl.load(box + 2 + axis)
    number, support = tl.load(box + 4).to(tl.int32), tl.load(box + 5)
    is_flipped = tl.load(numbers + flips_at + 2 * image + 1 - axis) > 0
    out = tl.where(axis == 0, height, width)
    index = tl.program_id(2) * PLACES + tl.arange(0, PLACES)
    place = tl.where(is_flipped, out - 1 - index, index).to(tl.float64)
    scale = length / out.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    centre = (place + 0.5) * scale
    reach = support * stretch
    low = tl.maximum((centre - reach + 0.5).to(tl.int32), 0)  # cut off towards zero
    high = tl.minimum((centre + reach + 0.5).to(tl.int32), length.to(tl.int32))
    tap = tl.arange(0, TAPS)
    position = low[:, None] + tap[None, :]
    distance = (position.to(tl.float64) - centre[:, None] + 0.5) / stretch
    weight = tl.where(position < high[:, None], _weight(distance, number), 0.0)
    total = tl.sum(weight, 1)
    weight = weight / tl.where(total == 0, 1.0, total)[:, None] * 4194304.0  # of 0 beyond the result
    whole = (weight + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32)
    line = (axis * tl.num_programs(0) + image) * side + index
    tl.store(first + line, low, index < out)
    mask = (index < out)[:, None] & (tap < taps)[None, :]
    tl.store(weights + line[:, None] * taps + tap[None, :], whole, mask)


@kernel
def resize(
    source,
    numbers,
    out,
    first,
    weights,
    sources_at,
    boxes_at,
    vertical_at,
    order_at,
    height,
    width,
    side,
    taps,
    apart,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Resize one axis of the crops: the first one of each image into `out`, or from there the second one.

    Args:
        source: pixels; in the second pass the result of the first, with images `apart` pixels apart.
        numbers: numbers of the views.
        out: (images, apart, 3) uint8; in the second pass (B, height, width, 3).
        first: (2, images, side) int32: first source pixel of each row, and of each column.
        weights: (2, images, side, taps) int32.
        sources_at, boxes_at, vertical_at, order_at: places of the plan's arrays.
        height, width: size of the result.
        side: the larger of both.
        taps: largest number of coefficients.
        apart: pixels between images of the first result.
    """
    image = tl.program_id(0)
    box = numbers + boxes_at + 6 * image
    top, left, crop_height, crop_width = (
        number_at(box, 0).to(tl.int32),
        number_at(box, 1).to(tl.int32),
        number_at(box, 2).to(tl.int32),
        number_at(box, 3).to(tl.int32),
    )
    is_vertical = tl.load(numbers + vertical_at + image) > 0
    if SECOND:
        start, line, top, left = image.to(tl.int64) * apart, tl.where(is_vertical, crop_width, width), 0, 0
        out_start = number_at(numbers, order_at + image) * height * width
        is_vertical = is_vertical == 0
        rows, columns = height, width
    else:
        start, line = (
            number_at(numbers, sources_at + 3 * image),
            number_at(numbers, sources_at + 3 * image + 2).to(tl.int32),
        )
        out_start = image.to(tl.int64) * apart
        rows, columns = tl.where(is_vertical, height, crop_height), tl.where(is_vertical, crop_width, width)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // columns, index % columns
    mask = row < rows
    axis = tl.where(is_vertical, 0, 1)
    place = (axis * tl.num_programs(0) + image) * side + tl.where(is_vertical, row, column)
    low = tl.load(first + place, mask, 0)
    y = top + tl.where(is_vertical, low, row)
    x = left + tl.where(is_vertical, column, low)
    pointer = source + (start + y.to(tl.int64) * line + x) * 3
    step = tl.where(is_vertical, line, 1) * 3
    weight_at = weights + place * taps
    red = tl.full((BLOCK,), 1 << 21, tl.int32)  # half of 1 << 22
    green, blue = red, red
    for tap in range(taps):
        weight = tl.load(weight_at + tap, mask, 0)
        used = weight != 0
        red += weight * tl.load(pointer, used, 0).to(tl.int32)
        green += weight * tl.load(pointer + 1, used, 0).to(tl.int32)
        blue += weight * tl.load(pointer + 2, used, 0).to(tl.int32)
        pointer += step
    target = out + (out_start + index) * 3
    tl.store(target, tl.minimum(tl.maximum(red >> 22, 0), 255).to(tl.uint8), mask)
    tl.store(target + 1, tl.minimum(tl.maximum(green >> 22, 0), 255).to(tl.uint8), mask)
    tl.store(target + 2, tl.minimum(tl.maximum(blue >> 22, 0), 255).to(tl.uint8), mask)
