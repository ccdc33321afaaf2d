"""Render batches on a GPU with kernels of our own: the pixels of `DeviceRenderer` in a few launches.

Shapes: B images, h x w pixels of the crops.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vitrail.data.render import kernels
from vitrail.data.render.device import DeviceRenderer
from vitrail.data.render.pil import fill_colour
from vitrail.data.render.plan import KERNELS, SUPPORTS, Operations, RenderPlan, is_vertical_first, tap_count
from vitrail.data.render.values import BOX_PASSES
from vitrail.data.views import Operation
from vitrail.types import InputSpec


class _Images(NamedTuple):
    """Where the images of an operation lie among the pixels."""

    area: int
    """Largest number of pixels of an image; the distance between images of one size."""
    side: int
    """Width of images of one size."""
    sources_at: int | None = None
    """Place of first pixels, heights and widths among the numbers; None for images of one size."""


class _Places(NamedTuple):
    """Where the arrays of a plan start among its numbers."""

    sources: int
    boxes: int
    flips: int
    vertical_first: int
    order: int


class _Crops(NamedTuple):
    """Crops to resize."""

    places: _Places
    taps: int
    apart: int
    """Pixels of the largest crop after one axis was resized."""


class GPURenderer(DeviceRenderer):
    """Renderer of planned batches on a GPU."""

    def __init__(
        self,
        spec: InputSpec,
        device: torch.device,
        erase_mode: str = "pixel",
        operations: Sequence[Operation] = (),
    ) -> None:
        super().__init__(spec, device, erase_mode, operations)
        self._fill = fill_colour(spec.mean)
        self._finished = lru_cache(8)(self._finished_crops)

    @torch.no_grad()
    def __call__(self, plan: RenderPlan) -> Tensor:
        """Return the normalised images (B, 3, h, w) float32 of a plan."""
        pixels, numbers = (part.to(self.device, non_blocking=True) for part in (plan.pixels, plan.numbers))
        if pixels is plan.pixels:  # operations change their pixels in place
            pixels = pixels.clone()
        self._before(plan, pixels, numbers)
        count, (height, width) = plan.order.shape[0], plan.crop_size
        images = self._resized(pixels, numbers, _crops(plan), count, plan.crop_size)
        for operations in (operations for layer in plan.after for operations in layer):
            if not self._in_place(operations, images, numbers, _Images(height * width, width)):
                batch, extents = images.permute(0, 3, 1, 2), self._whole(count, plan.crop_size)
                self._layers(batch, extents, ((operations,),), plan, numbers)
        if plan.output != plan.crop_size:
            images = self._resized(images, *self._finished(count, plan.crop_size, plan.output), count, plan.output)
        area = math.prod(plan.output)
        normalised = torch.empty((count, 3, *plan.output), device=self.device)
        _launch(kernels.normalise, count, area, images, normalised, area, self.mean, self.std)
        if plan.erased.shape[0]:
            self._erase(normalised, plan, numbers)
        return normalised

    def _erase(self, images: Tensor, plan: RenderPlan, numbers: Tensor) -> None:
        rows, boxes, _ = plan.erasing.shape
        modes = {"PIXEL": self.erase_mode == "pixel", "CONST": self.erase_mode == "const"}
        places = (plan.erased.start, plan.erasing.start, plan.noise.start)
        _launch(kernels.erase, rows, math.prod(plan.output), images, numbers, *places, boxes, *plan.output, **modes)

    def _before(self, plan: RenderPlan, pixels: Tensor, numbers: Tensor) -> None:
        """Apply the operations before the crop, in place."""
        if plan.array(plan.mirrored, plan.numbers).any():
            places, largest = (
                (0, plan.sources.start, plan.mirrored.start),
                max(math.prod(g.canvas) for g in plan.groups),
            )
            modes = {"VERTICAL": False, "FLAT": True, "FLAGGED": True}
            _launch(kernels.flip, plan.order.shape[0], largest, pixels, numbers, *places, 0, 0, **modes)
        for group in plan.groups:
            images = _Images(math.prod(group.canvas), 0, plan.sources.start + 3 * group.first)
            for operations in (operations for layer in group.before for operations in layer):
                self._in_place(operations, pixels, numbers, images)

    def _in_place(self, operations: Operations, pixels: Tensor, numbers: Tensor, images: _Images) -> bool:
        """Apply an operation in place, or return False if there is no kernel for it."""
        kind, count = operations.kind, operations.images.shape[0]
        flat, sources_at = {"FLAT": images.sources_at is not None}, images.sources_at or 0
        where, values_at = (operations.images.start, sources_at), operations.values.start
        size = (images.area, images.side)

        def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
            _launch(kernel, count, images.area, pixels, numbers, *arguments, **flat, **constants)

        def scratch() -> Tensor:
            return torch.empty((count, images.area, 3), dtype=torch.uint8, device=self.device)

        def copied() -> Tensor:
            copies = scratch()
            launch(kernels.copy, copies, *where, *size, images.area)
            return copies

        if kind == "table":
            tables = torch.empty((count, 3, 256), dtype=torch.uint8, device=self.device)
            kernels.make_tables[(count, 3)](
                pixels, numbers, tables, *where, values_at, *size, **flat, num_warps=8, **kernels.OPTIONS
            )
            launch(kernels.look_up, tables, *where, *size)
        elif kind in ("bilinear", "bicubic"):
            launch(
                kernels.affine, copied(), *where, values_at, *size, images.area, *self._fill, CUBIC=kind == "bicubic"
            )
        elif kind == "color":
            launch(kernels.color, *where, values_at, *size)
        elif kind == "sharpness":
            launch(kernels.sharpness, copied(), *where, values_at, *size, images.area)
        elif kind == "blur":
            other = scratch()
            for number in range(2 * BOX_PASSES):
                direction = {"VERTICAL": number >= BOX_PASSES, "BACK": number % 2 == 1}
                launch(kernels.blur, other, *where, values_at, *size, images.area, **direction)
        elif kind in ("hflip", "vflip"):
            launch(kernels.flip, *where, 0, *size, VERTICAL=kind == "vflip", FLAGGED=False)
        else:
            return False
        return True

    def _resized(self, pixels: Tensor, numbers: Tensor, crops: _Crops, count: int, output: tuple[int, int]) -> Tensor:
        """Return the resized crops (B, h, w, 3) uint8."""
        at, side = crops.places, max(output)
        first = torch.empty((2, count, side), dtype=torch.int32, device=self.device)
        weights = torch.empty((2, count, side, crops.taps), dtype=torch.int32, device=self.device)
        sizes, tile = (*output, side, crops.taps), {"TAPS": triton.next_power_of_2(crops.taps), "PLACES": 32}
        kernels.coefficients[(count, 2, triton.cdiv(side, 32))](
            numbers, first, weights, at.boxes, at.flips, *sizes, **tile, num_warps=4, **kernels.OPTIONS
        )
        between = torch.empty((count, crops.apart, 3), dtype=torch.uint8, device=self.device)
        images = torch.empty((count, *output, 3), dtype=torch.uint8, device=self.device)
        places = (at.sources, at.boxes, at.vertical_first, at.order)
        for source, target, is_second in ((pixels, between, False), (between, images, True)):
            area = math.prod(output) if is_second else crops.apart
            arguments = (source, numbers, target, first, weights, *places, *sizes, crops.apart)
            _launch(kernels.resize, count, area, *arguments, SECOND=is_second)
        return images

    def _finished_crops(self, count: int, size: tuple[int, int], output: tuple[int, int]) -> tuple[Tensor, _Crops]:
        """Return the numbers and places for resizing whole crops of `size` with Lanczos's kernel."""
        number = KERNELS.index("lanczos")
        is_vertical = is_vertical_first(size, output)
        columns = [
            torch.tensor([[index * math.prod(size), *size] for index in range(count)]),
            torch.tensor([[0, 0, *size, number, SUPPORTS[number]]]).expand(count, -1),
            torch.zeros(count, 2),
            torch.full((count,), float(is_vertical)),
            torch.arange(count),
        ]
        numbers = torch.cat([column.flatten().to(torch.float64) for column in columns]).to(self.device)
        places = _Places(0, 3 * count, 9 * count, 11 * count, 12 * count)
        taps = max(tap_count(SUPPORTS[number], side / out) for side, out in zip(size, output, strict=True))
        apart = output[0] * size[1] if is_vertical else size[0] * output[1]
        return numbers, _Crops(places, taps, apart)


def _crops(plan: RenderPlan) -> _Crops:
    boxes, is_vertical = (plan.array(slot, plan.numbers).numpy() for slot in (plan.boxes, plan.vertical_first))
    height, width = plan.crop_size
    between = (is_vertical > 0) * height * boxes[:, 3] + (is_vertical == 0) * boxes[:, 2] * width
    return _Crops(
        _Places(plan.sources.start, plan.boxes.start, plan.flips.start, plan.vertical_first.start, plan.order.start),
        taps=max(max(group.taps) for group in plan.groups),
        apart=int(between.max()),
    )


def _launch(kernel: Any, count: int, pixels: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel for `count` images of up to `pixels` pixels."""
    grid = (count, triton.cdiv(pixels, kernels.BLOCK))
    kernel[grid](*arguments, **constants, BLOCK=kernels.BLOCK, num_warps=4, **kernels.OPTIONS)
