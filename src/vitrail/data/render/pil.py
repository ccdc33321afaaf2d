"""Render a view with Pillow: timm's pixels, bit for bit.

Shapes: H x W pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from vitrail.data.images import as_image
from vitrail.data.views import Operation
from vitrail.types import Erasing, InputSpec, Picture, Step, View

_KERNELS = {kernel.name.lower(): kernel for kernel in Image.Resampling}


class Rendered(NamedTuple):
    """Image on its way to a batch, into which it is normalised: that saves a copy of its floats."""

    image: Image.Image
    view: View
    renderer: "PILRenderer"


def finish_batch(rendered: Sequence[Rendered]) -> Tensor:
    """Return the normalised pixels (B, 3, H, W) float32 of rendered images, in shared memory in a loader process."""
    shape = (len(rendered), 3, *rendered[0].view.output)
    if get_worker_info() is None:
        batch = torch.empty(shape)
    else:  # as PyTorch's default_collate does
        storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
        batch = torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]  # its stubs want a typed storage
    for item, out in zip(rendered, batch, strict=True):
        item.renderer.finish(item.image, item.view, out)
    return batch


class PILRenderer:
    """Renderer of views in loader processes.

    Args:
        spec: input of the network.
        erase_mode: content of erased boxes: `const`, `rand` or `pixel`.
        operations: operations of your own.
    """

    def __init__(self, spec: InputSpec, erase_mode: str = "pixel", operations: Sequence[Operation] = ()) -> None:
        self.values = normalised_values(spec.mean, spec.std)
        self.erase_mode, self.own = erase_mode, {operation.name: operation for operation in operations}
        self.fill = fill_colour(spec.mean)

    def __call__(self, picture: Picture, view: View) -> Tensor:
        """Return the normalised pixels (3, H, W) float32 of a view of `picture`."""
        pixels = torch.empty((3, *view.output))
        self.finish(self.image(picture, view), view, pixels)
        return pixels

    def finish(self, image: Image.Image, view: View, out: Tensor) -> None:
        """Normalise and erase an image, and write its pixels to `out` (3, H, W) float32."""
        _normalise(image, self.values, out.numpy())
        if view.erasing:
            _erase(out, view.erasing, self.erase_mode, view.noise)

    def image(self, picture: Picture, view: View) -> Image.Image:
        """Return a view of `picture` before normalisation and erasing."""
        steps = view.steps
        if steps and steps[0].name == "crop":  # only the crop of an array becomes an image
            image = _resized(_cropped(picture, steps[0]), steps[0], view)
            steps = steps[1:]
        else:
            image = as_image(picture)
        for step in steps:
            image = self._apply(image, step, view)
        if view.output != view.crop_size:
            image = image.resize((view.output[1], view.output[0]), Image.Resampling.LANCZOS)
        return image

    def _apply(self, image: Image.Image, step: Step, view: View) -> Image.Image:
        if step.name in _SIMPLE:
            return _SIMPLE[step.name](image, *step.values)
        if step.name in ("affine", "rotate"):
            return _transform(image, step, self.fill)
        if step.name == "crop":
            return _resized(_cropped(image, step), step, view)
        if step.name == "shift":
            return _shifted(image, step, view.crop_size)
        if step.name == "augmix":
            return self._augmix(image, step, view)
        return self.own[step.name].render_image(image, step.values)

    def _augmix(self, image: Image.Image, step: Step, view: View) -> Image.Image:
        """Mix the results of several chains, with timm's arithmetic."""
        weights, share, blended, chains = step.values
        results = []
        for chain in chains:
            result = image
            for part in chain:
                result = self._apply(result, part, view)
            results.append(result)
        if blended:
            return _blended(image, results, np.array(weights, np.float32), np.float32(share))
        mixed = np.zeros((image.height, image.width, 3), np.float32)
        for weight, result in zip(weights, results, strict=True):
            mixed += np.float32(weight) * np.asarray(result, np.float32)
        return Image.blend(image, Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)), share)


def fill_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """Return the colour of empty areas after a geometric operation, which timm takes from the mean."""
    return tuple(min(255, round(255 * value)) for value in mean)


def normalised_values(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Return the normalised value of each byte and channel (3, 256), with torchvision's arithmetic."""
    values = torch.arange(256, dtype=torch.float32).div_(255).expand(len(mean), -1)
    return ((values - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).numpy()


def _normalise(image: Image.Image, values: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write the normalised pixels of an RGB image to `out` (3, H, W), by a table (3, 256)."""
    pixels = np.asarray(image)
    for channel in range(3):
        values[channel].take(pixels[..., channel], out=out[channel], mode="clip")


class ToNormalised:
    """Transform from an RGB image to its normalised pixels (3, H, W) float32: torchvision's values in less time.

    Args:
        mean: mean for normalisation, for R, G and B in [0, 1].
        std: standard deviation for normalisation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.values = normalised_values(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the normalised pixels of an image."""
        pixels = torch.empty((3, image.height, image.width))
        _normalise(image, self.values, pixels.numpy())
        return pixels


def noise_generator(noise: tuple[int, int]) -> torch.Generator:
    """Return the CPU generator from which the content of a view's erased boxes is drawn."""
    seed, skipped = noise
    generator = torch.Generator().manual_seed(seed)
    for _ in range(skipped):
        torch.rand(1, generator=generator)
    return generator


def _erase(pixels: Tensor, boxes: Sequence[Erasing], mode: str, noise: tuple[int, int]) -> None:
    """Erase boxes of (3, H, W) in place, with timm's numbers."""
    generator = noise_generator(noise)
    for top, left, height, width in boxes:
        area = pixels[:, top : top + height, left : left + width]
        if mode == "const":
            area.zero_()
        else:
            shape = (3, height, width) if mode == "pixel" else (3, 1, 1)
            area.copy_(torch.empty(shape).normal_(generator=generator))


def _cropped(picture: Picture, step: Step) -> Image.Image:
    top, left, height, width = step.values[:4]
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture[top : top + height, left : left + width])
    return picture.crop((left, top, left + width, top + height))


def _resized(image: Image.Image, step: Step, view: View) -> Image.Image:
    height, width = view.crop_size
    return image.resize((width, height), _KERNELS[step.values[4]])


def _shifted(image: Image.Image, step: Step, output: tuple[int, int]) -> Image.Image:
    """Resize the whole image and move it; the border is black."""
    top, left, kernel = step.values
    height, width = output
    resized = (
        image if (image.width, image.height) == (width, height) else image.resize((width, height), _KERNELS[kernel])
    )
    return resized.crop((left, top, left + width, top + height))


def _transform(image: Image.Image, step: Step, fill: tuple[int, ...]) -> Image.Image:
    kernel = _KERNELS[step.values[-1]]
    if step.name == "rotate":
        return image.rotate(step.values[0], resample=kernel, fillcolor=fill)
    return image.transform(image.size, Image.Transform.AFFINE, step.values[:6], resample=kernel, fillcolor=fill)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep the highest bits. Pillow made an image of 0 bits black when the published models were trained."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _blended(image: Image.Image, results: list[Image.Image], weights: NDArray[np.float32], share: Any) -> Image.Image:
    """Blend chains into the image one after another, as timm's blended AugMix does."""
    remaining, shares = 1.0, []
    for weight in (weights * share)[::-1]:
        shares.append(weight / remaining)
        remaining *= 1 - shares[-1]
    for part, result in zip(np.array(shares[::-1], np.float32), results, strict=True):
        image = Image.blend(image, result, part)
    return image


_SIMPLE: dict[str, Callable[..., Image.Image]] = {
    "hflip": ImageOps.mirror,
    "vflip": ImageOps.flip,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": _posterize,
    "solarize": ImageOps.solarize,
    "solarize_add": _solarize_add,
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
}
