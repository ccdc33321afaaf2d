"""Crop and resize batches of images with Pillow's coefficients, as two matrix products.

Shapes: G images, H x W pixels of the canvas, h x w pixels of the result, K taps.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vitrail.data.render.plan import KERNELS, SUPPORTS, tap_count

_PRECISION = float(1 << 22)  # Pillow's coefficients are whole multiples of 1 / 2**22
_SPLIT = float(1 << 10)
_HAMMING = tuple(float(np.float32(value)) for value in (0.54, 0.46))  # Pillow has them in single precision


def resample(
    canvas: Tensor,
    boxes: Tensor,
    flips: Tensor,
    output: tuple[int, int],
    taps: tuple[int, int],
    vertical_first: bool,
    kernels: Sequence[str],
) -> Tensor:
    """Return the crops of images, resized to `output` and flipped, (G, 3, h, w) uint8.

    Args:
        canvas: images (G, 3, H, W) uint8 that fill at least their crop.
        boxes: (G, 6) float64: top, left, height and width of the crop in pixels, and number and support of the kernel.
        flips: (G, 2): flip horizontally and vertically.
        output: (h, w).
        taps: largest number of rows and columns of the canvas in one row and column of the result.
        vertical_first: resize rows before columns.
        kernels: names of the kernels of these images.
    """
    used = [(number, name) for number, name in enumerate(KERNELS) if name in kernels]
    top, left, height, width, number, support = boxes.unbind(1)  # an index list would wait for the device
    rows = _matrix(
        torch.stack((top, height, number, support), 1), flips[:, 1], output[0], canvas.shape[2], taps[0], used
    )
    columns = _matrix(
        torch.stack((left, width, number, support), 1), flips[:, 0], output[1], canvas.shape[3], taps[1], used
    )
    values = canvas.to(torch.float32)
    if vertical_first:
        return _across(_down(values, rows), columns).to(torch.uint8)
    return _down(_across(values, columns), rows).to(torch.uint8)


def resize(images: Tensor, output: tuple[int, int], vertical_first: bool) -> Tensor:
    """Resize images (G, 3, H, W) uint8 to `output` (h, w) with Lanczos's kernel."""
    number = KERNELS.index("lanczos")
    height, width = images.shape[-2:]
    whole = torch.full((len(images), 6), 0.0, device=images.device, dtype=torch.float64)
    for column, value in enumerate((0, 0, height, width, number, SUPPORTS[number])):
        whole[:, column] = value
    taps = tuple(tap_count(SUPPORTS[number], side / out) for side, out in zip((height, width), output, strict=True))
    flips = torch.zeros((len(images), 2), device=images.device)
    return resample(images, whole, flips, output, (taps[0], taps[1]), vertical_first, ("lanczos",))


def _across(values: Tensor, columns: Tensor) -> Tensor:
    """Resize columns: (G, 3, H, W) times (G, w, W) gives (G, 3, H, w), rounded."""
    count, channels, height, width = values.shape
    by_column = values.reshape(count, channels * height, width).transpose(1, 2)
    made = _rounded(_product(columns, by_column))  # (G, w, 3 * H)
    return made.transpose(1, 2).view(count, channels, height, -1)


def _down(values: Tensor, rows: Tensor) -> Tensor:
    """Resize rows: (G, h, H) times (G, 3, H, W) gives (G, 3, h, W), rounded."""
    count, channels, height, width = values.shape
    by_row = values.transpose(1, 2).reshape(count, height, channels * width)
    made = _rounded(_product(rows, by_row))
    return made.view(count, -1, channels, width).transpose(1, 2)


def _product(coefficients: Tensor, values: Tensor) -> Tensor:
    """Multiply coefficients (G, R, K) with whole numbers below 256 (G, K, C).

    On a GPU the coefficients are split into two parts of 11 bits, which its tensor cores multiply exactly.
    """
    if not values.is_cuda:
        return torch.bmm(coefficients, values)
    high = (coefficients * _SPLIT).round() / _SPLIT
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        made = torch.bmm(torch.cat((high, coefficients - high), dim=1), values)
    finally:
        torch.set_float32_matmul_precision(precision)
    first, second = made.chunk(2, dim=1)
    return first + second


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _matrix(
    axis: Tensor, flipped: Tensor, out: int, side: int, taps: int, kernels: Sequence[tuple[int, str]]
) -> Tensor:
    """Return the coefficients (G, out, side) float32 of one axis.

    Args:
        axis: (G, 4): first pixel and number of pixels of the crop, number and support of the kernel.
        flipped: (G,) whether to reverse the result.
        out: pixels of the result.
        side: pixels of the canvas.
        taps: largest number of coefficients that are not 0.
        kernels: numbers and names of the kernels of these images.
    """
    device = axis.device
    start, length, kernel, support = axis.unbind(1)
    scale = (length / torch.full_like(length, out))[:, None]  # not times 1 / out, which GPUs take for a number
    stretch = scale.clamp(min=1)
    reach = support[:, None] * stretch
    places = torch.arange(out, device=device, dtype=torch.float64)
    places = torch.where(flipped[:, None] > 0, out - 1 - places, places)
    centre = (places + 0.5) * scale
    low = (centre - reach + 0.5).trunc().clamp(min=0)
    high = torch.minimum((centre + reach + 0.5).trunc(), length[:, None])
    tap = torch.arange(taps, device=device, dtype=torch.float64)
    position = low[..., None] + tap  # (G, out, K)
    distance = (position - centre[..., None] + 0.5) / stretch[..., None]
    weights = torch.zeros_like(distance)
    for number, name in kernels:
        weights = torch.where(kernel[:, None, None] == number, _FUNCTIONS[name](distance), weights)
    valid = position < high[..., None]
    weights = torch.where(valid, weights, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    whole = torch.where(weights < 0, -0.5, 0.5).add(weights * _PRECISION).trunc() / _PRECISION
    # coefficients that are not valid go to a column of their own, which is cut off
    index = torch.where(valid, position + start[:, None, None], float(side)).long()
    matrix = torch.zeros((len(start), out, side + 1), device=device)
    return matrix.scatter_(2, index, whole.to(torch.float32))[..., :side]


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (_HAMMING[0] + _HAMMING[1] * torch.cos(x * math.pi)), 0.0)


def _cubic(x: Tensor) -> Tensor:
    """Keys's kernel with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where((x >= -3) & (x < 3), torch.sinc(x) * torch.sinc(x / 3), 0.0)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "box": _box,
    "bilinear": _triangle,
    "hamming": _hamming,
    "bicubic": _cubic,
    "lanczos": _lanczos,
}
