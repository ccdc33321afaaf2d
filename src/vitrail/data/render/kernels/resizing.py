"""Kernel that crops and resizes, with Pillow's fixed-point coefficients."""

import triton.language as tl

from vitrail.data.render.kernels.common import kernel, number_at


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
