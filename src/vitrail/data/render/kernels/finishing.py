"""Kernels of normalisation and random erasing."""

import triton
import triton.language as tl

from vitrail.data.render.kernels.common import kernel, number_at


@kernel
def normalise(pixels, out, area, means, deviations, BLOCK: tl.constexpr):
    """Write the normalised images (B, 3, area) float32 of pixels (B, area, 3)."""
    image = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < area
    for channel in tl.static_range(3):
        value = tl.load(pixels + (image * area + index) * 3 + channel, mask, 0).to(tl.float32)
        mean, deviation = tl.load(means + channel), tl.load(deviations + channel)
        tl.store(out + (image * 3 + channel) * area + index, tl.div_rn(value - mean, deviation), mask)


@triton.jit
def _hashed(value):
    """Return Wellons's lowbias32 of uint32 values."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def _normal(place, first_key, second_key):
    """Return normal numbers by Box and Muller's transform, a function of place and key."""
    first = _hashed(_hashed(place * 2 + first_key) ^ second_key)
    second = _hashed(_hashed(place * 2 + 1 + first_key) ^ second_key)
    uniform = ((first >> 8) + 1).to(tl.float32) * 5.960464477539063e-08  # of (0, 1]
    angle = (second >> 8).to(tl.float32) * 3.7450702829238413e-07  # below 2 pi
    return tl.sqrt(-2 * tl.log(uniform)) * tl.cos(angle)


@kernel
def erase(
    out,
    numbers,
    images_at,
    boxes_at,
    keys_at,
    boxes,
    height,
    width,
    PIXEL: tl.constexpr,
    CONST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Erase boxes of normalised images (B, 3, height, width) float32.

    Content: zero (CONST), a normal number for each value (PIXEL) or channel, which is a function of the image's key.
    """
    row = tl.program_id(0)
    image = number_at(numbers, images_at + row)
    first_key = number_at(numbers, keys_at + 2 * row).to(tl.uint32)
    second_key = number_at(numbers, keys_at + 2 * row + 1).to(tl.uint32)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x = index // width, index % width
    area = height * width
    for box in range(boxes):
        at = boxes_at + (row * boxes + box) * 4
        top, left = number_at(numbers, at), number_at(numbers, at + 1)
        mask = (
            (y >= top) & (y < top + number_at(numbers, at + 2)) & (x >= left) & (x < left + number_at(numbers, at + 3))
        )
        mask &= index < area
        for channel in tl.static_range(3):
            if CONST:
                content = tl.zeros((BLOCK,), tl.float32)
            else:
                place = (box * 3 + channel) * area + index if PIXEL else box * 3 + channel + 0 * index
                content = _normal(place.to(tl.uint32), first_key, second_key)
            tl.store(out + (image * 3 + channel) * area + index, content, mask)
