"""Draw views: everything that augmentation decides for one image, as plain data.

The draws are timm's, in timm's order: seeded alike, `TrainingViews` decides what `timm.data.create_transform` would
(`tests/peers/test_views.py` compares 20,000 views of each published augmentation). Unlike timm, a view never touches
pixels, and its random numbers come from generators of its own. Policies (which operations, with which probability and
magnitude) are read from timm's objects.

Steps of a view, with their values:

- `crop` (top, left, height, width, kernel): crop the box and resize it to `crop_size`.
- `shift` (top, left, kernel): resize the image to `crop_size`, then move it; black outside.
- `hflip`, `vflip`, `autocontrast`, `equalize`, `invert`: no values.
- `affine` (a, b, c, d, e, f, kernel): the pixel at (x, y) comes from (ax + by + c, dx + ey + f).
- `rotate` (degrees, kernel): rotate counter-clockwise about the centre.
- `posterize` (bits), `solarize` (threshold), `solarize_add` (added value below 128).
- `brightness`, `contrast`, `color`, `sharpness` (factor): Pillow's enhancements.
- `blur` (radius): Pillow's Gaussian blur.
- `augmix` (weights, share, blended, chains of steps): AugMix.
- The name of an operation of your own, with the values that it drew.

Kernels are Pillow's names: `bicubic`, `bilinear`, ...
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image
from torch import Tensor

from vitrail.data.policies import Draws, Policy, Size
from vitrail.types import Box, Erasing, Geometry, Step, View, Warp

if TYPE_CHECKING:
    from vitrail.data.augment import Augmentation

_RANDOM_KERNELS = ("bilinear", "bicubic")  # in timm's order
_ATTEMPTS = 10  # of timm's random crop and random erasing
_ERASED_AREA = (0.02, 1 / 3)  # share of the image
_ERASED_ASPECT = (math.log(0.3), math.log(1 / 0.3))


class Operation(Protocol):
    """Augmentation operation of your own: how it draws its values, and its two renderings.

    Operations run last, on images of the network's size; see docs/extending.md.
    """

    name: str
    """Name of its steps; no other operation may have it."""

    def draw(self, draws: Draws, size: Size) -> tuple[float, ...] | None:
        """Draw the values for an image of `size`; None leaves the image unchanged."""
        ...

    def render_image(self, image: Image.Image, values: tuple[float, ...]) -> Image.Image:
        """Return the changed RGB image."""
        ...

    def render_batch(self, images: Tensor, values: Tensor) -> Tensor:
        """Return the changed images (B, 3, H, W) uint8, for values (B, V) float32, on the images' device."""
        ...


class TrainingViews:
    """Views of training images.

    Args:
        augment: the augmentation.
        crop_size: (height, width) to which crops are resized, in pixels.
        hflip: probability of a horizontal flip.
        output: (height, width) of the network's input, in pixels, to which the finished crop is resized with Lanczos's
            kernel; None for `crop_size`.
    """

    def __init__(self, augment: "Augmentation", crop_size: Size, hflip: float, output: Size | None = None) -> None:
        self.augment, self.crop_size, self.output, self.hflip = augment, crop_size, output or crop_size, hflip
        self.policy = Policy(augment.auto_augment, crop_size, augment.interpolation)
        self._stages = list(self._ordered_stages())
        self._draws = Draws()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the generators and bound methods, for loader workers that are spawned."""
        return {name: value for name, value in vars(self).items() if name not in ("_draws", "_stages")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        vars(self).update(state)
        self._stages, self._draws = list(self._ordered_stages()), Draws()

    def draw_view(self, size: Size, *key: int) -> View:
        """Draw the view of an image.

        Args:
            size: (height, width) of the image, in pixels.
            key: what the draws depend on, such as (seed, epoch, index).
        """
        draws = self._draws
        seed = draws.seed(*key)
        steps: list[Step] = []
        current = size
        for stage in self._stages:
            current = stage(draws, current, steps)
        erasing = self._draw_erasing(draws) if self.augment.erase_prob > 0 else ()
        return View(size, self.crop_size, self.output, tuple(steps), erasing, (seed, draws.count))

    def _ordered_stages(self) -> Iterator[Callable[[Draws, Size, list[Step]], Size]]:
        """Return the stages in timm's order, each drawing steps for an image and returning the image's next size."""
        augment = self.augment
        crop = self._draw_shift if augment.shift is not None else self._draw_crop
        if not augment.crop_last:
            yield crop
        if self.hflip > 0:
            yield self._draw_hflip
        if augment.vflip > 0:
            yield self._draw_vflip
        if augment.auto_augment:
            yield self._draw_policy
        if augment.color_jitter > 0 and (not augment.auto_augment or "3a" in augment.auto_augment):
            yield self._draw_jitter
        if augment.crop_last:
            yield crop
        if augment.operations:
            yield self._draw_own

    def _draw_crop(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        box = _random_box(size, self.augment.scale, self.augment.ratio, draws.python)
        kernel = self.augment.interpolation
        steps.append(Step("crop", (*box, draws.python.choice(_RANDOM_KERNELS) if kernel == "random" else kernel)))
        return self.crop_size

    def _draw_shift(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        assert self.augment.shift is not None
        border = [round(self.augment.shift * side) for side in self.crop_size]
        moved = [draws.below(2 * pixels + 1) - pixels if any(border) else 0 for pixels in border]
        steps.append(Step("shift", (*moved, self.augment.interpolation)))
        return self.crop_size

    def _draw_hflip(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        if draws.share() < self.hflip:
            steps.append(Step("hflip"))
        return size

    def _draw_vflip(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        if draws.share() < self.augment.vflip:
            steps.append(Step("vflip"))
        return size

    def _draw_policy(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        steps += self.policy.draw(draws, size)
        return size

    def _draw_jitter(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        """Make torchvision's draws of ColorJitter: the order first, then all factors."""
        order = draws.order(4)
        low, high = max(0.0, 1 - self.augment.color_jitter), 1 + self.augment.color_jitter
        factors = [draws.between(low, high) for _ in range(3)]
        steps += [Step(("brightness", "contrast", "color")[kind], (factors[kind],)) for kind in order if kind < 3]
        return size

    def _draw_own(self, draws: Draws, size: Size, steps: list[Step]) -> Size:
        for operation in self.augment.operations:
            values = operation.draw(draws, size)
            if values is not None:
                steps.append(Step(operation.name, tuple(values)))
        return size

    def _draw_erasing(self, draws: Draws) -> tuple[Erasing, ...]:
        """Make timm's draws of RandomErasing."""
        python, (height, width) = draws.python, self.output
        if python.random() > self.augment.erase_prob:
            return ()
        count = 1 if self.augment.erase_count == 1 else python.randint(1, self.augment.erase_count)
        boxes = []
        for _ in range(count):
            for _ in range(_ATTEMPTS):
                area = python.uniform(*_ERASED_AREA) * (height * width) / count
                aspect = math.exp(python.uniform(*_ERASED_ASPECT))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if w < width and h < height:
                    boxes.append(Erasing(python.randint(0, height - h), python.randint(0, width - w), h, w))
                    break
        return tuple(boxes)


def _random_box(
    size: Size, scale: Sequence[float], ratio: Sequence[float], python: random.Random
) -> tuple[int, int, int, int]:
    """Make timm's draws of RandomResizedCrop: return top, left, height and width."""
    height, width = size
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_ATTEMPTS):
        area = python.uniform(*scale) * (width * height)
        aspect = math.exp(python.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            return python.randint(0, height - h), python.randint(0, width - w), h, w
    h, w = height, width  # the central crop with the nearest ratio
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


# Geometry of a view, for label maps.


def rotation(degrees: float, size: Size) -> tuple[float, ...]:
    """Return the affine matrix of a rotation about the centre of an image of `size`, rounded as Pillow rounds it."""
    angle = -math.radians(degrees % 360.0)
    a, b, d, e = (round(value, 15) for value in (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)))
    x, y = size[1] / 2, size[0] / 2
    return a, b, a * -x + b * -y + x, d, e, d * -x + e * -y + y


def geometry(view: View, warps: bool = True) -> Geometry:
    """Return the geometry of a view with a random crop, without vertical flips.

    Args:
        view: the view.
        warps: include rotations, shears and translations.
    """
    box: Box = (0.0, 0.0, 1.0, 1.0)
    flipped, found = False, []
    size = view.size
    for step in view.steps:
        if step.name == "crop":
            top, left, height, width = step.values[:4]
            box = (left / size[1], top / size[0], (left + width) / size[1], (top + height) / size[0])
            size = view.crop_size
        elif step.name == "hflip":
            flipped = True
            box = (1 - box[2], box[1], 1 - box[0], box[3])  # a box is one of the mirrored image
        elif warps and step.name in ("affine", "rotate"):
            matrix = step.values[:6] if step.name == "affine" else rotation(step.values[0], size)
            found.append(_warp(matrix, box, size))
    return Geometry(box, flipped, tuple(found))


def _warp(matrix: Sequence[float], box: Box, size: Size) -> Warp:
    """Return the warp of the whole image for a matrix in pixels of the part `box`, which has `size`."""
    x1, y1, x2, y2 = box
    a, b, c, d, e, f = matrix
    width, height = size[1] / (x2 - x1), size[0] / (y2 - y1)  # of the whole image, in these pixels
    b, d = b * height / width, d * width / height
    whole = (a, b, x1 + c / width - a * x1 - b * y1, d, e, y1 + f / height - d * x1 - e * y1)
    return Warp(whole, box)
