"""Training augmentation and evaluation transform, built with timm from the names used in configs.

Shapes: H x W pixels.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from vitrail.errors import ArgumentError, ConfigError
from vitrail.types import Box, InputSpec, View, Warp
from vitrail_runtime.checking import Length, NonNegative, Positive, PositiveInt, Share, checked

Transform = Callable[[Image.Image], Tensor]


# timm ignores parts of a policy that it does not know, so that a misspelt one would be another policy.
_NUMBER = r"\d+(?:\.\d+)?"
_POLICY = re.compile(
    rf"rand(?:-(?:m|n|mmax|inc)\d+|-(?:p|mstd){_NUMBER}|-t(?:weights|3aw?)?)*"
    rf"|(?:original|originalr|v0|v0r)(?:-mstd{_NUMBER})?|3a(?:-mstd{_NUMBER})?"
    rf"|augmix(?:-(?:m|w|d|b)\d+|-(?:a|mstd){_NUMBER})*"
)


@checked
@dataclass(frozen=True)
class Augmentation:
    """Arguments of timm's `create_transform`; see conf/augment for the published values.

    Attributes:
        scale: area of the random crop as a share of the image, (low, high).
        ratio: aspect ratio of the random crop, (low, high).
        hflip: probability of mirroring; None means the data set's default (letters and digits must not be mirrored).
        vflip: probability of flipping upside down.
        interpolation: kernel of the training crop: `bicubic`, `bilinear` or `random` (either, drawn for each image).
        auto_augment: RandAugment or AutoAugment string (`rand-m9-mstd0.5-inc1`), or `3a` for the 3-Augment of DeiT-III.
        color_jitter: strength of brightness, contrast and saturation jitter; no effect with RandAugment.
        erase_prob: probability of random erasing (Zhong et al., arXiv:1708.04896).
        erase_mode: content of the erased box: `const` (0), `rand` (one colour) or `pixel` (noise).
        erase_count: maximum number of boxes per image.
        crop_pct: share of the resized image that the evaluation crop covers.
        crop_mode: evaluation crop: `center`, `squash` (whole image, aspect ratio not kept) or `border` (padded).
        eval_interpolation: kernel of the evaluation resize.
        crop_last: crop after RandAugment instead of before it, as LV-ViT does. The crop then often removes the empty
            borders of a rotation, and RandAugment works on larger images.
        shift: instead of the random crop, shift the whole image by up to this share of its side and fill with zeros
            (black), as is usual for transfer to CIFAR; None means the random crop.
        warp_label_maps: apply RandAugment's rotations, shears and translations to label maps too.
        enabled: False uses the evaluation transform for training.
    """

    scale: Annotated[Sequence[Positive], Length(2)] = (0.08, 1.0)
    ratio: Annotated[Sequence[Positive], Length(2)] = (3 / 4, 4 / 3)
    hflip: Share | None = None
    vflip: Share = 0.0
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random"] = "bicubic"
    auto_augment: str | None = None
    color_jitter: NonNegative = 0.0
    erase_prob: Share = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: PositiveInt = 1
    crop_pct: Positive = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    eval_interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"] = "bicubic"
    crop_last: bool = False
    shift: Share | None = None
    warp_label_maps: bool = True
    enabled: bool = True

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ArgumentError(name, f"[{low:g}, {high:g}]", "the first must not be above the second")
        if self.auto_augment and not _POLICY.fullmatch(self.auto_augment):
            raise ArgumentError(
                "auto_augment",
                self.auto_augment,
                "not a policy of timm, such as rand-m9-mstd0.5-inc1, original-mstd0.5, augmix-m5-w4-d2, or 3a",
            )

    def training(self, spec: InputSpec, hflip: float) -> Transform:
        """Return the training transform from an RGB image to (3, H, W); `hflip` is used if `self.hflip` is None."""
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
        """Return the training transform that also returns the `View` of each image, which label maps need.

        Raises:
            ConfigError: the augmentation includes an operation that label maps do not support.
        """
        if self.vflip:
            raise ConfigError(f"augment.vflip={self.vflip}: label maps do not support vertical flips; set it to 0.")
        if self.shift is not None:
            raise ConfigError(f"augment.shift={self.shift}: label maps need the random crop; set it to null.")
        if not self.enabled:
            raise ConfigError("augment.enabled=false: label maps need the training crop; set it to true.")
        transform = self.training(spec, hflip)
        assert isinstance(transform, transforms.Compose)
        return ViewedTransform(transform, self.warp_label_maps)

    def evaluation(self, spec: InputSpec) -> Transform:
        """Return the deterministic evaluation transform from an RGB image to (3, H, W)."""
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
    """timm's training transform, with the same draws and pixels, that also returns the view.

    Args:
        transform: result of `Augmentation.training`.
        warps: record rotations, shears and translations.
    """

    def __init__(self, transform: transforms.Compose, warps: bool = True) -> None:
        self.transform, self.warps = transform, warps
        self._flip = _RecordedFlip(0.0)
        self._crop_first = isinstance(transform.transforms[0], RandomResizedCropAndInterpolation)
        self._reset()
        for number, stage in enumerate(transform.transforms):
            if isinstance(stage, RandomResizedCropAndInterpolation):
                stage.get_params = self._crop
            elif isinstance(stage, transforms.RandomHorizontalFlip):
                self._flip = transform.transforms[number] = _RecordedFlip(stage.p)
            for operation in _operations(stage):
                if operation.name.startswith(("Rotate", "Shear", "Translate")):
                    operation.aug_fn = partial(self._warp, operation.aug_fn)

    def _reset(self) -> None:
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
            recorder = _AffineRecorder(image.size)
            # A fixed kernel: timm would draw a random one here and so change the later draws.
            operation(recorder, *args, **{**kwargs, "resample": Image.Resampling.BILINEAR})
            x1, y1, x2, y2 = bounds = self._current_box()
            a, b, c, d, e, f = recorder.matrix
            width, height = image.width / (x2 - x1), image.height / (y2 - y1)  # size of the whole image in these pixels
            b, d = b * height / width, d * width / height
            matrix = (
                *(a, b, x1 + c / width - a * x1 - b * y1),
                *(d, e, y1 + f / height - d * x1 - e * y1),
            )
            self._warps.append(Warp(matrix, bounds))
        return operation(image, *args, **kwargs)

    def _current_box(self) -> Box:
        """Return the box of the (mirrored) image that the image covers at this stage."""
        x1, y1, x2, y2 = self._box
        # timm mirrors the crop, while a view crops the mirrored image.
        return (1 - x2, y1, 1 - x1, y2) if self._flip.flipped and self._crop_first else self._box

    def __call__(self, image: Image.Image) -> tuple[Tensor, View]:
        """Return the pixels (3, H, W) and their view."""
        self._reset()
        pixels = self.transform(image)
        return pixels, View(self._current_box(), self._flip.flipped, tuple(self._warps))


class _AffineRecorder:
    """Stand-in for an image that records the matrix of a geometric operation.

    `matrix` is (a, b, c, d, e, f): the pixel (x, y) comes from (ax + by + c, dx + ey + f).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def transform(self, size: tuple[int, int], method: Any, matrix: Any, **_: Any) -> None:
        """Record the matrix of Pillow's affine transform."""
        self.matrix = tuple(map(float, matrix))  # type: ignore[assignment]

    def rotate(self, degrees: float, **_: Any) -> None:
        """Record the matrix of Pillow's rotation, counter-clockwise about the centre."""
        x, y = self.size[0] / 2, self.size[1] / 2
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


class _RecordedFlip(transforms.RandomHorizontalFlip):
    """torchvision's flip, with the same draw, that records whether it flipped the last image."""

    flipped = False

    def forward(self, image: Image.Image) -> Image.Image:
        self.flipped = bool(torch.rand(1) < self.p)
        return ImageOps.mirror(image) if self.flipped else image


def _operations(stage: Any) -> list[Any]:
    """Return the operations that timm's RandAugment or AutoAugment chooses from."""
    return [*getattr(stage, "ops", ()), *(operation for policy in getattr(stage, "policy", ()) for operation in policy)]


def _fix_posterize(transform: transforms.Compose) -> None:
    """Make posterisation to 0 bits return a black image.

    timm draws 0 bits in 2 % of its posterisations. Pillow returned a black image when the published models were
    trained; current versions raise an error.
    """
    for stage in transform.transforms:
        for operation in _operations(stage):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
