"""Render batches on the training device: within 1 of 255 of Pillow for each operation.

Images are grouped by what is done to them. All sizes and groups come from the plan, so that nothing here waits for the
device.

Shapes: B images, G images of a group, h x w pixels of the network's input.
"""

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from vitrail.data.render.operations import Extents, affine, blur, color, flip, move, sharpness, tables
from vitrail.data.render.pil import fill_colour
from vitrail.data.render.plan import Group, Operations, RenderPlan, is_vertical_first
from vitrail.data.render.resample import resample, resize
from vitrail.data.render.values import BOX_PASSES, TABLES
from vitrail.data.views import Operation
from vitrail.types import InputSpec


def device_renderer(
    spec: InputSpec, device: torch.device, erase_mode: str = "pixel", operations: Sequence[Operation] = ()
) -> "DeviceRenderer":
    """Return the fastest renderer for a device: on a GPU one with kernels of its own, if Triton is installed."""
    if device.type == "cuda":
        with suppress(ImportError):  # of Triton, which PyTorch brings along on Linux
            from vitrail.data.render.gpu import GPURenderer

            return GPURenderer(spec, device, erase_mode, operations)
    return DeviceRenderer(spec, device, erase_mode, operations)


class DeviceRenderer:
    """Renderer of planned batches with PyTorch's operations, on any device; see `device_renderer`.

    Args:
        spec: input of the network.
        device: device on which to render.
        erase_mode: content of erased boxes: `const`, `rand` or `pixel`.
        operations: operations of your own.
    """

    def __init__(
        self,
        spec: InputSpec,
        device: torch.device,
        erase_mode: str = "pixel",
        operations: Sequence[Operation] = (),
    ) -> None:
        self.device, self.erase_mode = device, erase_mode
        self.own = {operation.name: operation for operation in operations}
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std))
        self.mean, self.std = mean * 255, std * 255
        self.fill = torch.tensor(fill_colour(spec.mean), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def __call__(self, plan: RenderPlan) -> Tensor:
        """Return the normalised images (B, 3, h, w) float32 of a plan."""
        pixels, numbers = (part.to(self.device, non_blocking=True) for part in (plan.pixels, plan.numbers))
        count = plan.order.shape[0]
        images = torch.empty((count, 3, *plan.crop_size), dtype=torch.uint8, device=self.device)
        order = plan.array(plan.order, numbers).long()
        for group in plan.groups:
            chosen = order[group.first : group.first + group.size]
            images[chosen] = self._crops(plan, group, pixels, numbers)
        images = self._layers(images, self._whole(count, plan.crop_size), plan.after, plan, numbers)
        if plan.output != plan.crop_size:
            images = resize(images, plan.output, is_vertical_first(plan.crop_size, plan.output))
        normalised = torch.sub(images, self.mean).div_(self.std)
        if plan.erased.shape[0]:
            self._erase(normalised, plan, numbers)
        return normalised

    def _whole(self, count: int, size: tuple[int, int]) -> Extents:
        """Return the extents of images that fill their canvas."""
        height, width = (torch.full((count,), side, device=self.device) for side in size)
        return Extents(height, width, are_canvas=True)

    def _crops(self, plan: RenderPlan, group: Group, pixels: Tensor, numbers: Tensor) -> Tensor:
        """Return the crops (G, 3, h, w) uint8 of a group."""
        members = slice(group.first, group.first + group.size)
        sources, mirrored, boxes, flips = (
            plan.array(slot, numbers)[members] for slot in (plan.sources, plan.mirrored, plan.boxes, plan.flips)
        )
        sources = sources.long()
        canvas = _unpacked(pixels, sources, mirrored, group.canvas)
        extents = Extents(sources[:, 1], sources[:, 2], are_canvas=False)
        canvas = self._layers(canvas, extents, group.before, plan, numbers)
        return resample(canvas, boxes, flips, plan.crop_size, group.taps, group.vertical_first, group.kernels)

    def _layers(
        self,
        images: Tensor,
        extents: Extents,
        layers: Sequence[Sequence[Operations]],
        plan: RenderPlan,
        numbers: Tensor,
    ) -> Tensor:
        """Apply operations to images (G, 3, H, W) uint8, in place where they lie."""
        for layer in layers:
            for operations in layer:
                chosen = plan.array(operations.images, numbers).long()
                values = plan.array(operations.values, numbers)
                images[chosen] = self._apply(operations, images[chosen], values, extents.of(chosen))
        return images

    def _apply(self, operations: Operations, images: Tensor, values: Tensor, extents: Extents) -> Tensor:
        kind = operations.kind
        if kind == "table":
            return tables(images, values, extents, TABLES)
        if kind in ("bilinear", "bicubic"):
            return affine(images, values, extents, kind, self.fill)
        if kind == "color":
            return color(images, values)
        if kind == "sharpness":
            return sharpness(images, values, extents)
        if kind == "blur":
            return blur(images, values, extents, operations.extent, BOX_PASSES)
        if kind == "move":
            return move(images, values)
        if kind in ("hflip", "vflip"):
            return flip(images, extents, 3 if kind == "hflip" else 2)
        return self.own[kind].render_batch(images, values.to(torch.float32))

    def _erase(self, images: Tensor, plan: RenderPlan, numbers: Tensor) -> None:
        """Erase boxes of normalised images (B, 3, h, w) in place."""
        chosen, boxes = plan.array(plan.erased, numbers).long(), plan.array(plan.erasing, numbers).long()
        y, x = (torch.arange(side, device=self.device) for side in plan.output)
        own = images[chosen]
        keys = plan.array(plan.noise, numbers).long()
        for number, (top, left, height, width) in enumerate(box.unbind(1) for box in boxes.unbind(1)):
            rows = (y >= top[:, None]) & (y < (top + height)[:, None])
            columns = (x >= left[:, None]) & (x < (left + width)[:, None])
            content = _content(self.erase_mode, keys, number, plan.output)
            own = torch.where(rows[:, None, :, None] & columns[:, None, None, :], content, own)
        images[chosen] = own


def _unpacked(pixels: Tensor, sources: Tensor, mirrored: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Return images (G, 3, H, W) uint8 on a canvas, from flat pixels (P, 3); other pixels of the canvas are arbitrary.

    Args:
        pixels: pixels of all images.
        sources: (G, 3) int64: first pixel, height, width.
        mirrored: (G,) whether to mirror the image.
        canvas: (H, W).
    """
    y, x = (torch.arange(side, device=pixels.device) for side in canvas)
    starts, _, widths = (value[:, None, None] for value in sources.unbind(1))
    x = torch.where(mirrored[:, None, None] > 0, widths - 1 - x, x)
    places = (starts + y[None, :, None] * widths + x).clamp_(0, len(pixels) - 1)
    return pixels[places].permute(0, 3, 1, 2).contiguous()


def _content(mode: str, keys: Tensor, box: int, output: tuple[int, int]) -> Tensor:
    """Return the content of erased boxes, to be broadcast to (E, 3, h, w): a function of the image's key alone.

    Args:
        mode: `const`, `rand` or `pixel`.
        keys: (E, 2) int64, below 2**32.
        box: number of the box.
        output: (h, w).
    """
    if mode == "const":
        return torch.zeros((), device=keys.device)
    shape = (3, *output) if mode == "pixel" else (3, 1, 1)
    count = math.prod(shape)
    places = torch.arange(box * count, (box + 1) * count, device=keys.device)
    return normal(keys, places).view(len(keys), *shape)


def normal(keys: Tensor, places: Tensor) -> Tensor:
    """Return normal numbers (E, N) float32, a function of key and place.

    Hashed counters (Wellons's lowbias32) give two uniform numbers, and Box and Muller's transform a normal one.

    Args:
        keys: (E, 2) int64, below 2**32.
        places: (N,) int64, below 2**31.
    """
    first = _hashed(_hashed(places * 2 + keys[:, :1]) ^ keys[:, 1:])
    second = _hashed(_hashed(places * 2 + 1 + keys[:, :1]) ^ keys[:, 1:])
    uniform = ((first >> 8) + 1).to(torch.float32) / (1 << 24)  # (0, 1]
    angle = (second >> 8).to(torch.float32) * (2 * math.pi / (1 << 24))
    return torch.sqrt(-2 * torch.log(uniform)) * torch.cos(angle)


def _hashed(values: Tensor) -> Tensor:
    """Return 32-bit hashes of int64 values, as int64."""
    values = values & 0xFFFFFFFF
    values = (values ^ (values >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    values = (values ^ (values >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return values ^ (values >> 16)
