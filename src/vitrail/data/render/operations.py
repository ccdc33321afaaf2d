"""Augmentation operations on batches of uint8 images, with Pillow's arithmetic.

Each operation is within 1 of 255 of Pillow's for the same input; tables and blends are equal. Images of one batch may
have different sizes: then they lie in the upper left corner of a larger canvas, and the area outside is undefined.

Shapes: G images, H x W pixels of the canvas, S pixels H * W.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (19595, 38470, 7471)  # of 65536: Pillow's weights of R, G and B
_SMOOTH_CENTRE, _SMOOTH_SUM = 5, 13  # of Pillow's SMOOTH filter, whose other weights are 1


class Extents(NamedTuple):
    """Sizes of images on a common canvas."""

    heights: Tensor
    """(G,) int64."""
    widths: Tensor
    """(G,) int64."""
    are_canvas: bool
    """Whether all images fill the canvas."""

    def of(self, images: Tensor) -> "Extents":
        """Return the sizes of the images with these numbers (G',)."""
        return Extents(self.heights[images], self.widths[images], self.are_canvas)

    def inside(self, canvas: Tensor) -> Tensor:
        """Return which pixels (G, H, W) of `canvas` (G, 3, H, W) belong to the images."""
        y, x = (torch.arange(side, device=canvas.device) for side in canvas.shape[-2:])
        return (y[None, :, None] < self.heights[:, None, None]) & (x[None, None] < self.widths[:, None, None])


def grey(images: Tensor) -> Tensor:
    """Return the luma (G, H, W) int32 of images (G, 3, H, W) uint8, rounded as Pillow rounds it."""
    red, green, blue = (
        channel.to(torch.int32) * weight for channel, weight in zip(images.unbind(1), _LUMA, strict=True)
    )
    return (red + green + blue + 0x8000) >> 16


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Blend as Pillow does: degenerate at factor 0, the image at 1, extrapolated beyond.

    Args:
        degenerate: whole numbers (G, 3 or 1, H, W) float32.
        images: (G, 3, H, W) uint8.
        factor: (G,) float32.
    """
    step = images.to(torch.float32).sub_(degenerate).mul_(factor[:, None, None, None])
    return step.add_(degenerate).clamp_(0, 255).to(torch.uint8)


def color(images: Tensor, values: Tensor) -> Tensor:
    """Blend with the grey image; `values` (G, 1) are the factors."""
    return blend(grey(images)[:, None].to(torch.float32), images, values[:, 0].to(torch.float32))


def sharpness(images: Tensor, values: Tensor, extents: Extents) -> Tensor:
    """Blend with the smoothed image; `values` (G, 1) are the factors."""
    own = images.to(torch.float32)
    padded = F.pad(own, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + (_SMOOTH_CENTRE - 1) * own
    # the sum is never halfway between two multiples of 13, so that float32 is exact
    smooth = total.div_(_SMOOTH_SUM).add_(0.5).floor_()
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    rows_kept = (y == 0) | (y == extents.heights[:, None] - 1)
    columns_kept = (x == 0) | (x == extents.widths[:, None] - 1)
    kept = rows_kept[:, None, :, None] | columns_kept[:, None, None, :]  # Pillow leaves the border as it is
    return blend(torch.where(kept, own, smooth), images, values[:, 0].to(torch.float32))


def tables(images: Tensor, values: Tensor, extents: Extents, kinds: tuple[str, ...]) -> Tensor:
    """Replace each value by that of a table.

    Args:
        images: (G, 3, H, W) uint8.
        values: (G, 258): number of the kind, factor, and the table of kind `fixed`.
        extents: sizes of the images.
        kinds: names of the kinds, by number.
    """
    kind, factor = values[:, 0].long(), values[:, 1].to(torch.float32)
    inside = None if extents.are_canvas else extents.inside(images)
    counts = _histograms(images, inside)
    fixed = values[:, None, 2:].to(torch.uint8).expand(-1, 3, -1)
    made = torch.where((kind == kinds.index("autocontrast"))[:, None, None], _autocontrast(counts), fixed)
    made = torch.where((kind == kinds.index("equalize"))[:, None, None], _equalize(counts), made)
    contrast = _contrast(images, inside, factor)[:, None]
    made = torch.where((kind == kinds.index("contrast"))[:, None, None], contrast, made)
    return made.gather(2, images.flatten(2).long()).view_as(images)


def _histograms(images: Tensor, inside: Tensor | None) -> Tensor:
    """Return how often each value occurs (G, 3, 256), int64."""
    count, channels = images.shape[:2]
    rows = torch.arange(count * channels, device=images.device).view(count, channels, 1) * 256
    places = (images.flatten(2).long() + rows).flatten()
    ones = torch.ones((), dtype=torch.int32, device=images.device)
    weights = ones.expand(places.shape[0])
    if inside is not None:
        weights = inside[:, None].expand_as(images).flatten().to(torch.int32)
    counts = torch.zeros(count * channels * 256, dtype=torch.int32, device=images.device)
    return counts.scatter_add_(0, places, weights).view(count, channels, 256).long()


def _autocontrast(counts: Tensor) -> Tensor:
    """Return tables (G, 3, 256) uint8 that stretch the lowest and highest value to 0 and 255."""
    levels = torch.arange(256, device=counts.device, dtype=torch.float64)
    found = counts > 0
    low = torch.where(found, levels, 255.0).amin(-1, keepdim=True)
    high = torch.where(found, levels, 0.0).amax(-1, keepdim=True)
    # a true division: dividing a number by a tensor multiplies with the rounded reciprocal
    scale = torch.full_like(high, 255.0) / (high - low).clamp(min=1)
    stretched = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def _equalize(counts: Tensor) -> Tensor:
    """Return tables (G, 3, 256) uint8 that spread the values evenly."""
    levels = torch.arange(256, device=counts.device)
    found = counts > 0
    last = torch.where(found, levels, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    spread = ((step // 2 + counts.cumsum(-1) - counts) // step.clamp(min=1)).clamp(max=255)
    return torch.where((found.sum(-1, keepdim=True) > 1) & (step > 0), spread, levels).to(torch.uint8)


def _contrast(images: Tensor, inside: Tensor | None, factor: Tensor) -> Tensor:
    """Return tables (G, 256) uint8 that blend with the mean grey."""
    luma = grey(images)
    if inside is None:
        mean = luma.flatten(1).sum(1, dtype=torch.int64) / (luma.shape[1] * luma.shape[2])
    else:
        mean = (luma * inside).flatten(1).sum(1, dtype=torch.int64) / inside.flatten(1).sum(1)
    levels = torch.arange(256, device=images.device, dtype=torch.float32)
    middle = (mean + 0.5).floor().to(torch.float32)[:, None]
    return ((levels - middle) * factor[:, None] + middle).clamp(0, 255).to(torch.uint8)


def affine(images: Tensor, values: Tensor, extents: Extents, kernel: str, fill: Tensor) -> Tensor:
    """Take each pixel (x, y) from (ax + by + c, dx + ey + f), as Pillow does.

    Args:
        images: (G, 3, H, W) uint8.
        values: (G, 6) float64: a to f, in pixels.
        extents: sizes of the images.
        kernel: `bilinear` or `bicubic`.
        fill: (3,) uint8: colour of pixels from outside.
    """
    a, b, c, d, e, f = (value[:, None, None] for value in values.unbind(1))
    y, x = (torch.arange(side, device=images.device, dtype=torch.float64) + 0.5 for side in images.shape[-2:])
    x, y = x[None, None], y[None, :, None]
    from_x, from_y = a * x + b * y + c, d * x + e * y + f  # (G, H, W)
    widths, heights = extents.widths[:, None, None], extents.heights[:, None, None]
    inside = (from_x >= 0) & (from_x < widths) & (from_y >= 0) & (from_y < heights)
    from_x, from_y = from_x - 0.5, from_y - 0.5
    left, top = from_x.floor(), from_y.floor()
    dx, dy = (from_x - left)[:, None], (from_y - top)[:, None]  # float64: results are cut off, so that 128 may be 127.9
    left, top = left.long(), top.long()
    columns = [_clip(left + step, widths) for step in _STEPS[kernel]]
    rows = [_clip(top + step, heights) for step in _STEPS[kernel]]
    flat, width = images.flatten(2), images.shape[-1]

    def pixel(row: Tensor, column: Tensor) -> Tensor:
        places = (row * width + column).flatten(1)[:, None].expand(-1, 3, -1)
        return flat.gather(2, places).view_as(images).to(torch.float64)

    mix = _bilinear if kernel == "bilinear" else _bicubic
    lines = [mix([pixel(row, column) for column in columns], dx) for row in rows]
    made = mix(lines, dy).clamp_(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], made, fill[:, None, None])


_STEPS = {"bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}


def _clip(places: Tensor, sizes: Tensor) -> Tensor:
    """Return the nearest places (G, H, W) inside images of `sizes` (G, 1, 1)."""
    return torch.minimum(places.clamp(min=0), sizes - 1)


def _bilinear(parts: list[Tensor], share: Tensor) -> Tensor:
    first, second = parts
    return first + (second - first) * share


def _bicubic(parts: list[Tensor], share: Tensor) -> Tensor:
    """Interpolate with a = -1, as Pillow's transforms do (its resize has a = -0.5)."""
    first, second, third, fourth = parts
    slope = third - first
    curve = 2 * (first - second) + third - fourth
    cubic = second - first - third + fourth
    return second + share * (slope + share * (curve + share * cubic))


def blur(images: Tensor, values: Tensor, extents: Extents, reach: int, passes: int) -> Tensor:
    """Blur with `passes` box filters in each direction, rounding after each, as Pillow's GaussianBlur does.

    Args:
        images: (G, 3, H, W) uint8.
        values: (G, 3): whole radius, weight of pixels within it, and weight of the next pixel on each side.
        extents: sizes of the images.
        reach: largest radius + 1.
        passes: number of filters.
    """
    # weights are multiples of 1 / 2**24, and halves are common: only float64 is exact
    radius, inner, outer = (value[:, None, None, None] for value in values.unbind(1))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    distance = offsets.abs().view(-1, 1, 1, 1, 1)
    weights = torch.where(distance <= radius, inner, torch.where(distance == radius + 1, outer, 0.0))
    made = images.to(torch.float64)
    for axis, sizes in ((3, extents.widths), (2, extents.heights)):
        places = torch.arange(images.shape[axis], device=images.device)
        near = torch.minimum(
            (places + offsets[:, None]).clamp(min=0)[:, None], sizes[None, :, None] - 1
        )  # (R, G, side)
        shape = (len(images), 1, 1, -1) if axis == 3 else (len(images), 1, -1, 1)
        indices = [index.view(shape).expand_as(made) for index in near]
        for _ in range(passes):
            total = sum(weight * made.gather(axis, index) for weight, index in zip(weights, indices, strict=True))
            made = (total + 0.5).floor()
    return made.to(torch.uint8)


def flip(images: Tensor, extents: Extents, axis: int) -> Tensor:
    """Reverse the columns (axis 3) or rows (axis 2) of images (G, 3, H, W)."""
    sizes = (extents.widths if axis == 3 else extents.heights)[:, None]
    places = (sizes - 1 - torch.arange(images.shape[axis], device=images.device)).clamp(min=0)
    shape = (len(images), 1, 1, -1) if axis == 3 else (len(images), 1, -1, 1)
    return images.gather(axis, places.view(shape).expand_as(images))


def move(images: Tensor, values: Tensor) -> Tensor:
    """Move the images (G, 3, H, W) uint8 by `values` (G, 2) rows and columns up and left; empty areas are black."""
    height, width = images.shape[-2:]
    top, left = (value.long()[:, None] for value in values.unbind(1))
    rows = torch.arange(height, device=images.device) + top
    columns = torch.arange(width, device=images.device) + left
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    found = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)
    return torch.where(inside[:, None], found, 0)
