"""Training augmentation and evaluation transform, by the names used in configs.

Shapes: H x W pixels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from vitrail.data.render.pil import ToNormalised
from vitrail.data.render.plan import BATCHED, KERNELS
from vitrail.data.views import TrainingViews
from vitrail.errors import ArgumentError, ConfigError
from vitrail.types import InputSpec
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
    """What training images go through, in timm's terms; see conf/augment for the published values.

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
        operations: operations of your own (`vitrail.data.views.Operation`), applied last.
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
    operations: Sequence[Any] = ()
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
        if self.shift is not None and self.interpolation == "random":
            raise ArgumentError("interpolation", "random", "shift needs one kernel, such as bicubic")
        names = [operation.name for operation in self.operations]
        if taken := {name for name in names if name in BATCHED or names.count(name) > 1}:
            raise ArgumentError("operations", min(taken), "another operation has this name; choose another one")

    def views(self, spec: InputSpec, hflip: float) -> TrainingViews:
        """Return the views of training images; `hflip` is used if `self.hflip` is None."""
        return TrainingViews(self, spec.size, hflip if self.hflip is None else self.hflip)

    def check_label_maps(self) -> None:
        """Check that label maps can follow the views.

        Raises:
            ConfigError: the augmentation includes an operation that label maps do not support.
        """
        if self.vflip:
            raise ConfigError(f"augment.vflip={self.vflip}: label maps do not support vertical flips; set it to 0.")
        if self.shift is not None:
            raise ConfigError(f"augment.shift={self.shift}: label maps need the random crop; set it to null.")
        if not self.enabled:
            raise ConfigError("augment.enabled=false: label maps need the training crop; set it to true.")
        if (self.auto_augment or "").startswith("augmix") and self.warp_label_maps:
            raise ConfigError(
                f"augment.auto_augment={self.auto_augment}: label maps cannot follow AugMix, which mixes several"
                " geometries; choose RandAugment, or set augment.warp_label_maps=false."
            )

    def device_problem(self) -> str | None:
        """Return what the device renderer cannot do, as a config value and the reason; None if it can do everything."""
        if not self.enabled:
            return "augment.enabled=false: the evaluation transform runs in the loader"
        if (self.auto_augment or "").startswith("augmix"):
            return f"augment.auto_augment={self.auto_augment}: AugMix runs in the loader"
        if self.interpolation not in (*KERNELS, "random"):
            return f"augment.interpolation={self.interpolation}: the device has {', '.join(KERNELS)} and random"
        for operation in self.operations:
            if not hasattr(operation, "render_batch"):
                return f"augment.operations: {operation.name} has no render_batch"
        return None

    def evaluation(self, spec: InputSpec) -> Transform:
        """Return the deterministic evaluation transform from an RGB image to (3, H, W)."""
        geometry = create_transform(
            input_size=spec.size,
            is_training=False,
            use_prefetcher=True,  # without conversion to a tensor and normalisation, which `ToNormalised` adds
            interpolation=self.eval_interpolation,
            mean=spec.mean,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return Compose([*geometry.transforms[:-1], ToNormalised(spec.mean, spec.std)])
