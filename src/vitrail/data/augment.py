"""Augmentation for training and the transform for evaluation, both timm's, under names that configs use."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from vitrail.errors import ConfigError
from vitrail.types import Box, InputSpec, View, Warp

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Arguments of timm's `create_transform`; see conf/augment for the published values.

    Attributes:
        scale: area of the random crop as a share of the image, (low, high).
        ratio: aspect ratio of the random crop, (low, high).
        hflip: probability of a mirrored image; None takes the data set's own (letters and digits must not be mirrored).
        vflip: probability of an upside-down image.
        interpolation: of the training crop: `bicubic`, `bilinear` or `random` (one of both for each image).
        auto_augment: RandAugment or AutoAugment string (`rand-m9-mstd0.5-inc1`), or `3a` for the 3-Augment of DeiT-III.
        color_jitter: strength of brightness, contrast and saturation jitter; no effect beside RandAugment.
        erase_prob: probability of random erasing (Zhong et al., arXiv:1708.04896).
        erase_mode: what the erased box holds: `const` (0), `rand` (one colour) or `pixel` (noise).
        erase_count: boxes per image, at most.
        crop_pct: share of the resized image that the evaluation crop covers.
        crop_mode: of evaluation: `center`, `squash` (whole image, aspect ratio lost) or `border` (padded).
        eval_interpolation: of evaluation.
        crop_last: crop after RandAugment rather than before it, as LV-ViT does: borders that a rotation leaves empty
            are often cut away, and RandAugment has larger images to work on.
        shift: instead of the random crop, move the whole image by up to this share of its side, zeros (black) coming
            in, as CIFAR is transferred with; None for the random crop.
        warp_label_maps: label maps follow RandAugment's rotations, shears and translations; False leaves them as they
            were.
        enabled: False trains on the evaluation transform.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float | None = None
    vflip: float = 0.0
    interpolation: str = "bicubic"
    auto_augment: str | None = None
    color_jitter: float = 0.0
    erase_prob: float = 0.0
    erase_mode: str = "pixel"
    erase_count: int = 1
    crop_pct: float = 0.875
    crop_mode: str = "center"
    eval_interpolation: str = "bicubic"
    crop_last: bool = False
    shift: float | None = None
    warp_label_maps: bool = True
    enabled: bool = True

    def training(self, spec: InputSpec, hflip: float) -> Transform:
        """Transform from an RGB image to (3, H, W); `hflip` is used where the augmentation names none."""
        if not self.enabled:
            return self.evaluation(spec)
        transform = create_transform(
            input_size=spec.size,
            is_training=True,
            scale=tuple(self.scale),
            ratio=tuple(self.ratio),
            hflip=hflip if self.hflip is None else self.hflip,
            vflip=self.vflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=spec.mean,
            std=spec.std,
            re_prob=self.erase_prob,
            re_mode=self.erase_mode,
            re_count=self.erase_count,
        )
        _fix_posterize(transform)
        stages = transform.transforms
        if self.shift is not None:
            border = [round(self.shift * side) for side in reversed(spec.size)]
            resize = transforms.Resize(spec.size, str_to_interp_mode(self.interpolation))
            stages[0] = transforms.Compose([resize, transforms.RandomCrop(spec.size, border)])
        if self.crop_last:
            crop = stages.pop(0)
            stages.insert(next(i for i, stage in enumerate(stages) if isinstance(stage, MaybeToTensor)), crop)
        return transform

    def viewed(self, spec: InputSpec, hflip: float) -> "ViewedTransform":
        """As `training`, telling with each image which part of it was taken; label maps follow that.

        Raises:
            ConfigError: an augmentation that label maps cannot follow.
        """
        if self.vflip:
            raise ConfigError(f"augment.vflip={self.vflip}: label maps do not follow vertical flips; set it to 0.")
        if self.shift is not None:
            raise ConfigError(f"augment.shift={self.shift}: label maps follow the random crop; set it to null.")
        if not self.enabled:
            raise ConfigError("augment.enabled=false: label maps follow the training crop; leave it on.")
        transform = self.training(spec, hflip)
        assert isinstance(transform, transforms.Compose)
        return ViewedTransform(transform, self.warp_label_maps)

    def evaluation(self, spec: InputSpec) -> Transform:
        """Resize and crop from an RGB image to (3, H, W), the same for every call."""
        return create_transform(
            input_size=spec.size,
            is_training=False,
            interpolation=self.eval_interpolation,
            mean=spec.mean,
            std=spec.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )


class ViewedTransform:
    """timm's training transform, with the same draws and pixels, that also gives the view.

    Args:
        transform: what `Augmentation.training` made.
        warps: tell of rotations, shears and shifts.
    """

    def __init__(self, transform: transforms.Compose, warps: bool = True) -> None:
        self.transform, self.warps = transform, warps
        self._flip = _RecordedFlip(0.0)
        self._crop_first = isinstance(transform.transforms[0], RandomResizedCropAndInterpolation)
        self._forget()
        for number, stage in enumerate(transform.transforms):
            if isinstance(stage, RandomResizedCropAndInterpolation):
                stage.get_params = self._crop
            elif isinstance(stage, transforms.RandomHorizontalFlip):
                self._flip = transform.transforms[number] = _RecordedFlip(stage.p)
            for operation in _operations(stage):
                if operation.name.startswith(("Rotate", "Shear", "Translate")):
                    operation.aug_fn = partial(self._warp, operation.aug_fn)

    def _forget(self) -> None:
        self._box: Box = (0.0, 0.0, 1.0, 1.0)
        self._warps: list[Warp] = []
        self._flip.flipped = False

    def _crop(self, image: Image.Image, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        right, bottom = left + width, top + height
        self._box = (left / image.width, top / image.height, right / image.width, bottom / image.height)
        return top, left, height, width

    def _warp(self, operation: Callable[..., Any], image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        if self.warps:
            spy = _Spy(image.size)
            operation(spy, *args, **{**kwargs, "resample": Image.Resampling.BILINEAR})  # fixed: draws nothing
            x1, y1, x2, y2 = bounds = self._seen()
            a, b, c, d, e, f = spy.matrix
            width, height = image.width / (x2 - x1), image.height / (y2 - y1)  # of the whole image, in these pixels
            b, d = b * height / width, d * width / height
            matrix = (
                *(a, b, x1 + c / width - a * x1 - b * y1),
                *(d, e, y1 + f / height - d * x1 - e * y1),
            )
            self._warps.append(Warp(matrix, bounds))
        return operation(image, *args, **kwargs)

    def _seen(self) -> Box:
        """The box of the (mirrored) image that the picture shows at this stage."""
        x1, y1, x2, y2 = self._box
        # timm mirrors the crop; a view is a crop of the mirrored image.
        return (1 - x2, y1, 1 - x1, y2) if self._flip.flipped and self._crop_first else self._box

    def __call__(self, image: Image.Image) -> tuple[Tensor, View]:
        """Pixels (3, H, W), and where they come from."""
        self._forget()
        pixels = self.transform(image)
        return pixels, View(self._seen(), self._flip.flipped, tuple(self._warps))


class _Spy:
    """Stands in for an image to learn what a geometric operation would do to it.

    `matrix`: at the pixel (x, y) it puts what was at (ax + by + c, dx + ey + f).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def transform(self, size: tuple[int, int], method: Any, matrix: Any, **_: Any) -> None:
        """Pillow's affine transform."""
        self.matrix = tuple(map(float, matrix))  # type: ignore[assignment]

    def rotate(self, degrees: float, **_: Any) -> None:
        """Pillow's rotation, counter-clockwise about the centre."""
        x, y = self.size[0] / 2, self.size[1] / 2
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


class _RecordedFlip(transforms.RandomHorizontalFlip):
    """torchvision's flip, with the same draw, that remembers what it did last."""

    flipped = False

    def forward(self, image: Image.Image) -> Image.Image:
        self.flipped = bool(torch.rand(1) < self.p)
        return ImageOps.mirror(image) if self.flipped else image


def _operations(stage: Any) -> list[Any]:
    """The operations that timm's RandAugment or AutoAugment chooses from."""
    return [*getattr(stage, "ops", ()), *(operation for policy in getattr(stage, "policy", ()) for operation in policy)]


def _fix_posterize(transform: transforms.Compose) -> None:
    """Let timm's RandAugment and AutoAugment keep 0 bits of a colour, as they draw in 2 % of their posterisations.

    Pillow made the picture black there, which the published runs saw; current versions raise an error.
    """
    for stage in transform.transforms:
        for operation in _operations(stage):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
