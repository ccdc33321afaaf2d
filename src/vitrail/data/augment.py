"""Augmentation for training and the transform for evaluation, both timm's, under names that configs use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from vitrail.data.mixing import Mixing, MixToken
from vitrail.errors import ConfigError
from vitrail.types import View

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Pixels:
    """What a network is fed: side or (height, width) in pixels, and the statistics that normalise it, in [0, 1]."""

    size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
        enabled: False trains on the evaluation transform.
        mix: mixup and CutMix, or MixToken, of training batches; None for none.
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
    enabled: bool = True
    mix: Mixing | MixToken | None = None

    def training(self, pixels: Pixels, hflip: float) -> Transform:
        """Transform from an RGB image to (3, H, W); `hflip` is used where the augmentation names none."""
        if not self.enabled:
            return self.evaluation(pixels)
        transform = create_transform(
            input_size=pixels.size,
            is_training=True,
            scale=tuple(self.scale),
            ratio=tuple(self.ratio),
            hflip=hflip if self.hflip is None else self.hflip,
            vflip=self.vflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=pixels.mean,
            std=pixels.std,
            re_prob=self.erase_prob,
            re_mode=self.erase_mode,
            re_count=self.erase_count,
        )
        _mend_posterize(transform)
        return transform

    def viewed(self, pixels: Pixels, hflip: float) -> "ViewedTransform":
        """As `training`, telling with each image which part of it was taken; label maps follow that.

        Raises:
            ConfigError: an augmentation that label maps cannot follow.
        """
        if self.vflip:
            raise ConfigError(f"augment.vflip={self.vflip}: label maps do not follow vertical flips; set it to 0.")
        if not self.enabled:
            raise ConfigError("augment.enabled=false: label maps follow the training crop; leave it on.")
        transform = self.training(pixels, hflip)
        assert isinstance(transform, transforms.Compose)
        return ViewedTransform(transform)

    def evaluation(self, pixels: Pixels) -> Transform:
        """Resize and crop from an RGB image to (3, H, W), the same for every call."""
        return create_transform(
            input_size=pixels.size,
            is_training=False,
            interpolation=self.eval_interpolation,
            mean=pixels.mean,
            std=pixels.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )


class ViewedTransform:
    """timm's training transform, with the same draws and pixels, that also gives the view."""

    def __init__(self, transform: transforms.Compose) -> None:
        self.transform = transform
        self._box, self._flip = (0.0, 0.0, 1.0, 1.0), _RecordedFlip(0.0)
        for number, stage in enumerate(transform.transforms):
            if isinstance(stage, RandomResizedCropAndInterpolation):
                stage.get_params = self._crop
            elif isinstance(stage, transforms.RandomHorizontalFlip):
                self._flip = transform.transforms[number] = _RecordedFlip(stage.p)

    def _crop(self, image: Image.Image, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        self._box = (
            left / image.width,
            top / image.height,
            (left + width) / image.width,
            (top + height) / image.height,
        )
        return top, left, height, width

    def __call__(self, image: Image.Image) -> tuple[Tensor, View]:
        """Pixels (3, H, W), and where they come from."""
        self._flip.flipped = False
        pixels = self.transform(image)
        x1, y1, x2, y2 = self._box
        # timm mirrors the crop; a view is a crop of the mirrored image.
        return pixels, View((1 - x2, y1, 1 - x1, y2), True) if self._flip.flipped else View(self._box, False)


class _RecordedFlip(transforms.RandomHorizontalFlip):
    """torchvision's flip, with the same draw, that remembers what it did last."""

    flipped = False

    def forward(self, image: Image.Image) -> Image.Image:
        self.flipped = bool(torch.rand(1) < self.p)
        return ImageOps.mirror(image) if self.flipped else image


def _mend_posterize(transform: transforms.Compose) -> None:
    """Let timm's RandAugment and AutoAugment keep 0 bits of a colour, as they draw in 2 % of their posterisations.

    Pillow made the picture black there, which the published runs saw; current versions raise an error.
    """
    for stage in transform.transforms:
        policies = [operation for policy in getattr(stage, "policy", ()) for operation in policy]
        for operation in [*getattr(stage, "ops", ()), *policies]:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
