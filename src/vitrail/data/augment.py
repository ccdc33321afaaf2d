"""Augmentation for training and the transform for evaluation, both timm's, under names that configs use."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from vitrail.data.mixing import Mixing

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
        mix: mixup and CutMix of training batches; None for none.
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
    mix: Mixing | None = None

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
