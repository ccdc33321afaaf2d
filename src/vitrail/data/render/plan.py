"""Plan the rendering of a batch: what goes from a loader process to the device.

Pixels of all images go in one flat tensor without padding, and all numbers of their views in another. Everything that
decides what the device does (groups of images, sizes) is known here, so that the device never has to be waited for.

Shapes: B images, G images of a group.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrail.data.render.shipping import Shipped
from vitrail.data.render.values import VALUES, own_values
from vitrail.types import Step, View

KERNELS = ("box", "bilinear", "hamming", "bicubic", "lanczos")
"""Kernels of the batched resize, by number; also the order of `SUPPORTS`."""
SUPPORTS = (0.5, 1.0, 1.0, 2.0, 3.0)
BATCHED = frozenset(
    (
        *("crop", "shift", "hflip", "vflip", "affine", "rotate", "blur"),
        *("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
        *("brightness", "contrast", "color", "sharpness"),
    )
)
"""Steps that the device renders, besides operations of your own."""

_GROUP = 64  # images that are padded to a common size


class Slot(NamedTuple):
    """Place of an array in the flat tensor of numbers."""

    start: int
    shape: tuple[int, ...]


class Operations(NamedTuple):
    """One kind of operation on some images of a group or a batch."""

    kind: str
    images: Slot
    """(G,) numbers of the images within the group or batch."""
    values: Slot
    """(G, V)."""
    extent: int = 0
    """Pixels that the largest blur reaches."""


class Group(NamedTuple):
    """Neighbours in the order of a plan that are resized together."""

    first: int
    """Place of the first image in the plan's order."""
    size: int
    """Number of images."""
    canvas: tuple[int, int]
    """(height, width) that holds all sources."""
    taps: tuple[int, int]
    """Largest number of source rows and columns in one output row and column."""
    vertical_first: bool
    kernels: tuple[str, ...]
    before: tuple[tuple[Operations, ...], ...]
    """Operations before the crop, by layer."""


class RenderPlan(NamedTuple):
    """Images of a batch before rendering."""

    pixels: Tensor
    """(P, 3) uint8: the pixels of all images, row by row."""
    numbers: Tensor
    """(V,) float64: all numbers of the views."""
    order: Slot
    """(B,) numbers of the images in the order of the groups, which the next five arrays have too."""
    sources: Slot
    """(B, 3): first pixel in `pixels`, height, width."""
    boxes: Slot
    """(B, 6): top, left, height and width of the crop in the source, and number and support of the kernel."""
    flips: Slot
    """(B, 2): flip horizontally and vertically after the crop, 0 or 1."""
    mirrored: Slot
    """(B,): mirror the source before its operations, 0 or 1."""
    vertical_first: Slot
    """(B,): resize rows before columns, 0 or 1."""
    groups: tuple[Group, ...]
    after: tuple[tuple[Operations, ...], ...]
    """Operations after the crop, by layer, on images of all groups: a few large operations cost less than many."""
    crop_size: tuple[int, int]
    """(height, width) to which crops are resized."""
    output: tuple[int, int]
    """(height, width) of the network's input."""
    erased: Slot
    """(E,) numbers of the images with erased boxes."""
    erasing: Slot
    """(E, K, 4): top, left, height and width of their boxes; empty boxes have height 0."""
    noise: Slot
    """(E, 2): two numbers below 2**32 that the content of the boxes depends on."""

    def array(self, slot: Slot, numbers: Tensor) -> Tensor:
        """Return the array of a slot from `numbers`, which may be on a device."""
        return numbers[slot.start : slot.start + math.prod(slot.shape)].view(slot.shape)


def plan_batch(shipped: Sequence[Shipped], group_size: int = _GROUP) -> RenderPlan:
    """Plan the rendering of a batch of B pictures."""
    views = [item.view for item in shipped]
    numbers = _Numbers()
    sizes = np.array([item.pixels.shape[:2] for item in shipped], np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes.prod(1))))
    pixels = torch.empty((int(starts[-1]), 3), dtype=torch.uint8)
    flat = pixels.numpy()
    for item, start, end in zip(shipped, starts, starts[1:], strict=False):
        np.copyto(flat[start:end].reshape(item.pixels.shape), item.pixels)
    parts = [_split(view) for view in views]
    crop_size = views[0].crop_size
    tall = np.array([is_vertical_first(part.crop.values[2:4], crop_size) for part in parts])
    grouped = list(_grouped(sizes.prod(1), tall, group_size))
    order = np.concatenate(grouped)
    parts_in_order = [parts[index] for index in order]
    boxes = np.array([_box(part.crop) for part in parts_in_order], np.float64)
    in_order = (
        numbers.add(order),
        numbers.add(np.column_stack((starts[:-1], sizes))[order]),
        numbers.add(boxes),
        numbers.add([(part.hflip, part.vflip) for part in parts_in_order]),
        numbers.add([part.mirrored for part in parts_in_order]),
        numbers.add(tall[order]),
    )
    groups, first = [], 0
    for members in grouped:
        chosen = slice(first, first + len(members))
        groups.append(_plan_group(numbers, first, sizes[members], parts_in_order[chosen], boxes[chosen], crop_size))
        first += len(members)
    after = _plan_layers(numbers, [part.after for part in parts], [crop_size] * len(parts))
    erased = [index for index, view in enumerate(views) if view.erasing]
    count = max((len(views[index].erasing) for index in erased), default=1)
    erasing = np.zeros((len(erased), count, 4))
    for row, index in enumerate(erased):
        erasing[row, : len(views[index].erasing)] = views[index].erasing
    noise = [((views[index].noise[0] >> 32), views[index].noise[0] & 0xFFFFFFFF) for index in erased]
    slots = numbers.add(erased), numbers.add(erasing), numbers.add(np.array(noise).reshape(-1, 2))
    return RenderPlan(pixels, numbers.tensor(), *in_order, tuple(groups), after, crop_size, views[0].output, *slots)


def tap_count(support: float, scale: float) -> int:
    """Return the largest number of source pixels in one pixel of the result, for a kernel's support."""
    return math.ceil(support * max(scale, 1.0)) * 2 + 1


class _Numbers:
    """Arrays that are joined to one tensor."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.float64]] = []
        self.length = 0

    def add(self, values: Any) -> Slot:
        """Append an array, and return its place."""
        array = np.asarray(values, np.float64)
        slot = Slot(self.length, array.shape)
        self.parts.append(array.ravel())
        self.length += array.size
        return slot

    def tensor(self) -> Tensor:
        """Return all arrays as one tensor (V,)."""
        return torch.from_numpy(np.concatenate(self.parts))


class _Parts(NamedTuple):
    """Steps of a view around its crop; flips next to the crop are apart."""

    mirrored: bool
    before: list[Step]
    crop: Step
    hflip: bool
    vflip: bool
    after: list[Step]
    size: tuple[int, int]


def _split(view: View) -> _Parts:
    number = next(index for index, step in enumerate(view.steps) if step.name == "crop")
    before, after = list(view.steps[:number]), list(view.steps[number + 1 :])
    mirrored = bool(before) and before[0].name == "hflip"
    flips = {"hflip": False, "vflip": False}
    while after and after[0].name in flips:
        flips[after.pop(0).name] ^= True
    return _Parts(mirrored, before[mirrored:], view.steps[number], flips["hflip"], flips["vflip"], after, view.size)


def is_vertical_first(size: Sequence[int], output: tuple[int, int]) -> bool:
    """Return whether Pillow resizes rows before columns: since version 13, for images that shrink mostly in height."""
    rows, columns = size[0] - output[0], size[1] - output[1]
    return _PILLOW_CHOOSES and rows > 0 and rows > 2 * columns


_PILLOW_CHOOSES = int(Image.__version__.split(".")[0]) >= 13


def _grouped(areas: NDArray[np.int64], tall: NDArray[np.bool_], group_size: int) -> Iterable[NDArray[np.int64]]:
    """Return the images of each group: with the same order of passes, and similar areas."""
    for kind in (False, True):
        members = np.flatnonzero(tall == kind)
        if len(members):
            members = members[np.argsort(areas[members], kind="stable")]
            yield from np.array_split(members, -(-len(members) // group_size))


def _box(crop: Step) -> tuple[float, ...]:
    number = KERNELS.index(crop.values[4])
    return *crop.values[:4], number, SUPPORTS[number]


def _plan_group(
    numbers: _Numbers,
    first: int,
    sizes: NDArray[np.int64],
    parts: list[_Parts],
    boxes: NDArray[np.float64],
    output: tuple[int, int],
) -> Group:
    supports = boxes[:, 5].tolist()
    taps = [max(map(tap_count, supports, (boxes[:, 2 + axis] / output[axis]).tolist())) for axis in (0, 1)]
    return Group(
        first,
        len(parts),
        (int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        (taps[0], taps[1]),
        is_vertical_first(boxes[0, 2:4].tolist(), output),
        tuple(sorted({part.crop.values[4] for part in parts})),
        _plan_layers(numbers, [part.before for part in parts], [(int(height), int(width)) for height, width in sizes]),
    )


def _plan_layers(
    numbers: _Numbers, steps: list[list[Step]], sizes: list[tuple[int, int]]
) -> tuple[tuple[Operations, ...], ...]:
    """Plan the first operation of every image, then the second, and so on; equal kinds together."""
    layers = []
    for layer in range(max(map(len, steps), default=0)):
        kinds: dict[str, list[tuple[int, Sequence[float]]]] = {}
        for index, (own, size) in enumerate(zip(steps, sizes, strict=True)):
            if layer < len(own):
                kind, values = VALUES.get(own[layer].name, own_values)(own[layer], size)
                kinds.setdefault(kind, []).append((index, values))
        layers.append(tuple(_plan_kind(numbers, kind, found) for kind, found in kinds.items()))
    return tuple(layers)


def _plan_kind(numbers: _Numbers, kind: str, found: list[tuple[int, Sequence[float]]]) -> Operations:
    values = np.array([values for _, values in found], np.float64)
    extent = int(values[:, 0].max()) + 1 if kind == "blur" else 0
    return Operations(kind, numbers.add([index for index, _ in found]), numbers.add(values), extent)
