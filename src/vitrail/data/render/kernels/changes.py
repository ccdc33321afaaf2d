"""Kernels of flips and of operations on values and near neighbours."""

import triton
import triton.language as tl

from vitrail.data.render.kernels.common import clip, image_at, kernel, number_at, rounded_off

_TABLES_BLOCK = tl.constexpr(4096)
_AUTOCONTRAST, _EQUALIZE, _CONTRAST = (tl.constexpr(number) for number in range(3))  # as in `values.TABLES`


@kernel
def flip(
    pixels,
    numbers,
    images_at,
    sources_at,
    flags_at,
    area,
    side,
    VERTICAL: tl.constexpr,
    FLAT: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reverse rows or columns; with FLAGGED only of images whose flag at `flags_at` is set, and in the plan's order."""
    if FLAGGED:
        at = sources_at + 3 * tl.program_id(0)
        start, height, width = number_at(numbers, at), number_at(numbers, at + 1), number_at(numbers, at + 2)
        height = tl.where(tl.load(numbers + flags_at + tl.program_id(0)) > 0, height, 0)
    else:
        start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if VERTICAL:
        other = (height - 1 - index // width) * width + index % width
    else:
        other = index // width * width + (width - 1 - index % width)
    mask = (index < height * width) & (index < other)
    here, there = pixels + (start + index) * 3, pixels + (start + other) * 3
    for channel in tl.static_range(3):
        first, second = tl.load(here + channel, mask), tl.load(there + channel, mask)
        tl.store(here + channel, second, mask)
        tl.store(there + channel, first, mask)


@kernel
def copy(pixels, numbers, out, images_at, sources_at, area, side, apart, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Copy images to `out` (images, apart, 3) uint8."""
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    index = tl.program_id(1) * BLOCK * 3 + tl.arange(0, BLOCK)
    here, there = pixels + start * 3, out + tl.program_id(0).to(tl.int64) * apart * 3
    for part in tl.static_range(3):
        place = index + part * BLOCK
        mask = place < height * width * 3
        tl.store(there + place, tl.load(here + place, mask), mask)


@triton.jit
def _grey(pixels, place, mask):
    red = tl.load(pixels + place, mask, 0).to(tl.int32)
    green = tl.load(pixels + place + 1, mask, 0).to(tl.int32)
    blue = tl.load(pixels + place + 2, mask, 0).to(tl.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _blend(degenerate, value, factor):
    return rounded_off((value - degenerate) * factor + degenerate)


@kernel
def make_tables(pixels, numbers, out, images_at, sources_at, values_at, area, side, FLAT: tl.constexpr):
    """Make the table of each image and channel (the second index of a program) in `out` (images, 3, 256) uint8.

    The values (258) of an image are the number of the kind, the factor, and the table itself for other kinds.
    """
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    image, channel = tl.program_id(0), tl.program_id(1)
    values = numbers + values_at + 258 * image
    kind = tl.load(values)
    level = tl.arange(0, 256)
    table = tl.load(values + 2 + level).to(tl.int32)
    count = (height * width).to(tl.int32)
    block = tl.arange(0, _TABLES_BLOCK)
    if kind == _CONTRAST:
        total = tl.zeros((_TABLES_BLOCK,), tl.int64)
        for at in range(0, count, _TABLES_BLOCK):
            mask = at + block < count
            grey = _grey(pixels, (start + at + block) * 3, mask)
            total += tl.where(mask, grey, 0)
        mean = tl.sum(total).to(tl.float64) / count.to(tl.float64)
        middle = tl.floor(mean + 0.5).to(tl.float32)
        factor = tl.load(values + 1).to(tl.float32)
        table = tl.minimum(tl.maximum((level.to(tl.float32) - middle) * factor + middle, 0.0), 255.0).to(tl.int32)
    if kind < _CONTRAST:
        found = tl.zeros((256,), tl.int32)
        for at in range(0, count, _TABLES_BLOCK):
            mask = at + block < count
            value = tl.load(pixels + (start + at + block) * 3 + channel, mask, 0).to(tl.int32)
            found += tl.histogram(value, 256)
            found -= tl.where(level == 0, tl.sum((mask == 0).to(tl.int32)), 0)  # values outside were read as 0
        if kind == _AUTOCONTRAST:
            low = tl.min(tl.where(found > 0, level, 255)).to(tl.float64)
            high = tl.max(tl.where(found > 0, level, 0)).to(tl.float64)
            scale = 255.0 / tl.maximum(high - low, 1.0)
            stretched = level.to(tl.float64) * scale + -low * scale
            stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
            table = tl.where(high > low, stretched, level)
        else:
            last = tl.max(tl.where(found > 0, level, 0))
            step = (count - tl.sum(tl.where(level == last, found, 0))) // 255
            spread = (step // 2 + tl.cumsum(found) - found) // tl.maximum(step, 1)
            several = tl.sum((found > 0).to(tl.int32)) > 1
            table = tl.where(several & (step > 0), tl.minimum(spread, 255), level)
    tl.store(out + (image * 3 + channel) * 256 + level, table.to(tl.uint8))


@kernel
def look_up(pixels, numbers, tables, images_at, sources_at, area, side, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Replace each value by that of its image's and channel's table."""
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < height * width
    pointer, table = pixels + (start + index) * 3, tables + tl.program_id(0) * 768
    for channel in tl.static_range(3):
        value = tl.load(pointer + channel, mask, 0).to(tl.int32)
        tl.store(pointer + channel, tl.load(table + channel * 256 + value, mask), mask)


@kernel
def color(pixels, numbers, images_at, sources_at, values_at, area, side, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Blend with the grey image; the value of an image is its factor."""
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    factor = tl.load(numbers + values_at + tl.program_id(0)).to(tl.float32)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < height * width
    pointer = pixels + (start + index) * 3
    grey = _grey(pixels, (start + index) * 3, mask).to(tl.float32)
    for channel in tl.static_range(3):
        value = tl.load(pointer + channel, mask, 0).to(tl.float32)
        tl.store(pointer + channel, _blend(grey, value, factor), mask)


@kernel
def sharpness(
    pixels,
    numbers,
    source,
    images_at,
    sources_at,
    values_at,
    area,
    side,
    apart,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blend with the smoothed image, of which `source` has copies; the value of an image is its factor."""
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    factor = tl.load(numbers + values_at + tl.program_id(0)).to(tl.float32)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x = index // width, index % width
    mask = index < height * width
    is_inner = mask & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)  # Pillow leaves the border as it is
    own = source + tl.program_id(0).to(tl.int64) * apart * 3
    for channel in tl.static_range(3):
        value = tl.load(own + index * 3 + channel, mask, 0).to(tl.int32)
        total = 4 * value
        for dy in tl.static_range(-1, 2):
            for dx in tl.static_range(-1, 2):
                total += tl.load(own + (index + dy * width + dx) * 3 + channel, is_inner, 0).to(tl.int32)
        smooth = tl.where(is_inner, (2 * total + 13) // 26, value).to(tl.float32)
        tl.store(pixels + (start + index) * 3 + channel, _blend(smooth, value.to(tl.float32), factor), mask)


@kernel
def blur(
    pixels,
    numbers,
    source,
    images_at,
    sources_at,
    values_at,
    area,
    side,
    apart,
    VERTICAL: tl.constexpr,
    BACK: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply one box filter from `pixels` to the copies in `source`, or BACK.

    The values of an image are the whole radius, the weight of pixels within it, and that of the next pixels.
    """
    start, height, width = image_at(numbers, images_at, sources_at, area, side, FLAT)
    values = numbers + values_at + 3 * tl.program_id(0)
    radius = tl.load(values).to(tl.int32)
    inner, outer = tl.load(values + 1), tl.load(values + 2)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < height * width
    y, x = index // width, index % width
    here, there = pixels + start * 3, source + tl.program_id(0).to(tl.int64) * apart * 3
    for channel in tl.static_range(3):
        total = tl.zeros((BLOCK,), tl.float64)  # sums of multiples of 1 / 2**24: exact
        for offset in range(-radius - 1, radius + 2):
            if VERTICAL:
                place = clip(y + offset, height) * width + x
            else:
                place = y * width + clip(x + offset, width)
            weight = tl.where((offset < -radius) | (offset > radius), outer, inner)
            if BACK:
                total += weight * tl.load(there + place * 3 + channel, mask, 0).to(tl.float64)
            else:
                total += weight * tl.load(here + place * 3 + channel, mask, 0).to(tl.float64)
        value = rounded_off(total + 0.5)
        if BACK:
            tl.store(here + index * 3 + channel, value, mask)
        else:
            tl.store(there + index * 3 + channel, value, mask)
