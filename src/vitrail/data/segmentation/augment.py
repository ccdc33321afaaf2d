"""Joint augmentation of images and masks, with torchvision's transforms.

The pipeline and its values are those of mmsegmentation's ADE20K recipes, which DINOv3 uses too: ratio resize, crop with
a limit on the share of one class, flip, photometric distortion, normalisation, padding at the bottom right. Saturation
blends with grey and the hue is shifted in floats, where OpenCV scales and shifts the rounded HSV channels.

Shapes: H x W pixels.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitrail.types import MASK_IGNORE
from vitrail_runtime.checking import Length, NonNegative, Positive, PositiveInt, Range, Share, checked

Interval = Annotated[Sequence[NonNegative], Length(2)]


def fitted_size(size: tuple[int, int], short_side: float, long_side: float) -> tuple[int, int]:
    """Return (height, width) scaled to the largest size within both limits, with the same aspect ratio.

    Args:
        size: (height, width) in pixels.
        short_side: limit of the shorter side.
        long_side: limit of the longer side.
    """
    factor = min(long_side / max(size), short_side / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resized(image: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Resize an image (3, H, W) bilinearly, or a `Mask` (H, W) to the nearest value, to (height, width) pixels."""
    return F.resize(image, list(size), v2.InterpolationMode.BILINEAR, antialias=antialias)


def normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return an image (3, H, W) uint8 as normalised float32."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(mean), list(std))


@checked
class JointAugmentation:
    """Augmentation of an image and its mask with the same geometry; the mask's values never mix.

    Args:
        short_side: shorter side of an image at ratio 1, in pixels.
        long_side: limit of the longer side at ratio 1, in pixels.
        ratio: interval of the resize ratio, drawn uniformly.
        max_class_share: draw the crop again while one class fills at least this share of its labelled pixels.
        crop_attempts: draws of the crop until then.
        hflip: probability of a horizontal flip.
        photometric: probability of each of brightness, contrast, saturation and hue.
        brightness: limit of the value that is added, as a share of white.
        contrast: interval of the factor of all values.
        saturation: interval of the factor of the saturation.
        hue: limit of the shift of the hue, as a share of the circle.
        antialias: antialias the image when it is made smaller, which OpenCV and the published recipes do not.
    """

    def __init__(
        self,
        short_side: PositiveInt = 512,
        long_side: PositiveInt = 2048,
        ratio: Annotated[Sequence[Positive], Length(2)] = (0.5, 2.0),
        max_class_share: Share = 0.75,
        crop_attempts: PositiveInt = 10,
        hflip: Share = 0.5,
        photometric: Share = 0.5,
        brightness: Share = 32 / 255,
        contrast: Interval = (0.5, 1.5),
        saturation: Interval = (0.5, 1.5),
        hue: Annotated[float, Range(ge=0, le=0.5)] = 0.1,
        antialias: bool = False,
    ) -> None:
        self.short_side, self.long_side, self.ratio = short_side, long_side, tuple(ratio)
        self.max_class_share, self.crop_attempts, self.hflip = max_class_share, crop_attempts, hflip
        self.photometric, self.brightness, self.hue = photometric, brightness, hue
        self.contrast, self.saturation, self.antialias = tuple(contrast), tuple(saturation), antialias

    def __call__(
        self, image: Tensor, mask: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Return an augmented image (3, height, width), float32, and its mask (height, width), uint8.

        Args:
            image: (3, H, W) uint8.
            mask: (H, W) uint8 classes, or `MASK_IGNORE`.
            size: (height, width) of the result in pixels.
            mean: mean of the normalisation.
            std: standard deviation of the normalisation.

        The draws come from PyTorch's global generator.
        """
        pair: tuple[Any, Any] = tv_tensors.Image(image), tv_tensors.Mask(mask)
        ratio = _uniform(self.ratio)
        sides = fitted_size((mask.shape[0], mask.shape[1]), ratio * self.short_side, ratio * self.long_side)
        pair = resized(pair[0], sides, self.antialias), resized(pair[1], sides)
        box = self._crop_box(pair[1], size)
        pair = F.crop(pair[0], *box), F.crop(pair[1], *box)
        if _happens(self.hflip):
            pair = F.horizontal_flip(pair[0]), F.horizontal_flip(pair[1])
        return padded(normalised(self._distorted(pair[0]), mean, std), pair[1], size)

    def describe(self) -> list[str]:
        """Describe the augmentation of a training image, one step per line."""
        low, high = self.ratio
        words = [
            f"resized to a shorter side of {self.short_side}, a longer side of at most {self.long_side} pixels, times"
            f" {low:g} to {high:g}",
            f"a crop in which no class fills {100 * self.max_class_share:g} % or more",
        ]
        if self.hflip:
            words.append(f"mirrored with probability {self.hflip:g}")
        if self.photometric:
            words.append(f"brightness, contrast, saturation and hue, each with probability {self.photometric:g}")
        return words

    def _crop_box(self, mask: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Draw top, left, height and width of a crop, until no class fills too much of it or the attempts are used up.

        mmsegmentation draws once more than it checks.
        """
        sides = [min(whole, part) for whole, part in zip(mask.shape, size, strict=True)]
        for attempt in range(self.crop_attempts + 1):
            top, left = (
                int(torch.randint(whole - part + 1, ())) for whole, part in zip(mask.shape, sides, strict=True)
            )
            if attempt == self.crop_attempts or self.max_class_share == 1:
                break
            crop = mask[top : top + sides[0], left : left + sides[1]]
            counts = torch.bincount(crop.flatten(), minlength=MASK_IGNORE + 1)[:MASK_IGNORE]
            if counts.count_nonzero() > 1 and int(counts.max()) < self.max_class_share * int(counts.sum()):
                break
        return top, left, sides[0], sides[1]

    def _distorted(self, image: Tensor) -> Tensor:
        """Draw brightness, contrast, saturation and hue, each with its probability; contrast comes early or late."""
        if _happens(self.photometric):
            shift = 255 * _uniform((-self.brightness, self.brightness))
            image = (image.float() + shift).clamp(0, 255).to(torch.uint8)
        early = _happens(0.5)
        if early:
            image = self._contrasted(image)
        if _happens(self.photometric):
            image = F.adjust_saturation(image, _uniform(self.saturation))
        if _happens(self.photometric):
            image = F.adjust_hue(image, _uniform((-self.hue, self.hue)))
        return image if early else self._contrasted(image)

    def _contrasted(self, image: Tensor) -> Tensor:
        # mmsegmentation's contrast multiplies all values, which torchvision calls brightness.
        return F.adjust_brightness(image, _uniform(self.contrast)) if _happens(self.photometric) else image


def padded(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pad a normalised image (3, H, W) with 0 and its mask (H, W) with `MASK_IGNORE`, at the bottom right."""
    space = [0, 0, size[1] - mask.shape[1], size[0] - mask.shape[0]]
    padded_image, padded_mask = (
        F.pad(part, space, fill=fill) if any(space) else part for part, fill in ((image, 0), (mask, MASK_IGNORE))
    )
    return padded_image.as_subclass(Tensor), padded_mask.as_subclass(Tensor)


def _uniform(interval: Sequence[float]) -> float:
    low, high = interval
    return low + (high - low) * float(torch.rand(()))


def _happens(probability: float) -> bool:
    return float(torch.rand(())) < probability
