"""Types that the packages exchange: samples from `data`, outputs from `models`, targets for `objectives`.

Shapes: B images, C classes, N patch tokens, D channels, K scores per cell, E entries per token, H x W pixels or cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrail_runtime.checking import Length, PositiveInt, check_value

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSize = PositiveInt | Annotated[Sequence[PositiveInt], Length(2)]
"""Image size in a config: the side of a square, or (height, width), in pixels."""

IGNORE = -1
"""Label of a padding sample: losses and metrics skip it."""

MASK_IGNORE = 255
"""Value of a mask's pixels that are not labelled: losses and metrics skip them."""

TOKEN_WEIGHT = 0.5
"""Weight of the maximum over token logits in the logits of an image (arXiv:2104.10858, official code)."""


def height_width(size: ImageSize) -> tuple[int, int]:
    """Return an image size as (height, width).

    Raises:
        ArgumentError: it is something else.
    """
    check_value("image_size", size, ImageSize)
    return (int(size), int(size)) if isinstance(size, (int, Integral)) else (int(size[0]), int(size[1]))


@dataclass(frozen=True)
class InputSpec:
    """Input of a network: image size, normalisation, and the resize and crop of evaluation images.

    Attributes:
        size: (height, width) in pixels.
        mean: value subtracted from R, G and B in [0, 1].
        std: divisor of R, G and B.
        interpolation: kernel of the evaluation resize.
        crop_pct: share of the resized image that the evaluation crop covers.
        crop_mode: evaluation crop: `center`, `squash` or `border`.
        value_range: black and white of images with more than 8 bits per channel; None if there were none.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    value_range: tuple[float, float] | None = None


Picture = Union["Image", NDArray[np.uint8]]
"""Decoded RGB image: Pillow's, or an array (H, W, 3)."""


class Sample(NamedTuple):
    """One image of a source.

    `key` identifies the image in every store, such as label maps (`n01440764/n01440764_10026`).
    """

    image: Picture
    label: int
    key: str


Box = tuple[float, float, float, float]
"""x1, y1, x2, y2, each in [0, 1] of the image, after mirroring if it is mirrored."""


class Warp(NamedTuple):
    """A rotation, shear or translation by RandAugment; coordinates x, y in [0, 1] of the (mirrored) image.

    The warped image at (x, y) comes from (ax + by + c, dx + ey + f).
    """

    matrix: tuple[float, float, float, float, float, float]
    bounds: Box
    """Extent of the image before the warp; pixels from outside it are grey."""


class Geometry(NamedTuple):
    """Geometry of one view: mirror the image if `flipped`, apply the warps, then crop the box."""

    box: Box
    flipped: bool
    warps: tuple[Warp, ...] = ()


class Step(NamedTuple):
    """One operation of a view and its drawn values, such as `("solarize", (128,))`; see `vitrail.data.views`."""

    name: str
    values: tuple[Any, ...] = ()


class Erasing(NamedTuple):
    """Box of random erasing, in pixels of the network's input."""

    top: int
    left: int
    height: int
    width: int


class View(NamedTuple):
    """Everything that augmentation decided for one image, as plain data; `vitrail.data.render` makes its pixels."""

    size: tuple[int, int]
    """(height, width) of the image, in pixels."""
    crop_size: tuple[int, int]
    """(height, width) to which the crop is resized, in pixels."""
    output: tuple[int, int]
    """(height, width) of the network's input, in pixels; smaller than `crop_size` if the finished crop is resized."""
    steps: tuple[Step, ...]
    """Operations, in order; one of them is the crop."""
    erasing: tuple[Erasing, ...] = ()
    """Boxes to erase after normalisation."""
    noise: tuple[int, int] = (0, 0)
    """Seed of the erased boxes' content, and how many numbers to draw before it."""


class LabelMap(NamedTuple):
    """Top K scores of an annotator for one image, and the geometry of the image's view."""

    scores: Tensor
    """(K, H, W) float16; in a batch (B, K, H, W)."""
    classes: Tensor
    """(K, H, W) int32; in a batch (B, K, H, W)."""
    box: Tensor
    """(4,) float32, see `Geometry`; in a batch (B, 4)."""
    flipped: Tensor
    """() bool; in a batch (B,)."""


class Item(NamedTuple):
    """A sample after augmentation, ready to be collated."""

    image: Any
    """(3, H, W) float32, normalised; on its way to a batch a `vitrail.data.render.Rendered` or `Shipped`."""
    label: Any
    """Class index, or `IGNORE`; for segmentation a mask (H, W) uint8."""
    key: str
    label_map: LabelMap | None = None
    view: View | None = None
    """View of a training image."""


class Mix(Protocol):
    """Mixing of one batch with its reverse: one draw for pixels, labels, label maps and tokens."""

    @property
    def token_box(self) -> Tensor | None:
        """(4,) top, left, bottom, right in cells: tokens to swap in the network; None if pixels are mixed."""
        ...

    def images(self, images: Tensor) -> Tensor:
        """Return the mixed images (B, 3, H, W); may modify its argument in place."""
        ...

    def probabilities(self, values: Tensor) -> Tensor:
        """Mix values of whole images (B, C): class probabilities or teacher logits."""
        ...

    def tokens(self, targets: SparseTokens, grid: tuple[int, int]) -> SparseTokens:
        """Mix token targets (B, N, C) on a grid (rows, columns)."""
        ...


class Batch(NamedTuple):
    """Collated items: the argument of a training or validation step."""

    image: Tensor
    """(B, 3, H, W) float32; mixed once `mix` is set."""
    label: Tensor
    """(B,) int64 class indices, or `IGNORE`; not mixed. For segmentation masks (B, H, W): classes or `MASK_IGNORE`."""
    key: list[str]
    label_map: LabelMap | None = None
    mix: Mix | None = None
    """Mixing of this batch; None if it is not mixed."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`; a batch is mixed after that.

        Lightning calls it. Otherwise it would look at each key in every step.
        """
        parts = (self.image, self.label, *(self.label_map or ()))
        image, label, *maps = (part.to(device, non_blocking=device.type not in ("cpu", "mps")) for part in parts)
        return self._replace(image=image, label=label, label_map=LabelMap(*maps) if maps else None)


class Outputs(NamedTuple):
    """Outputs of a backbone.

    `extras` holds further outputs by name. An objective requests one as `outputs.<name>`.
    """

    cls: Tensor
    """Logits (B, C) of the class token or of pooled features; for segmentation (B, C, h, w)."""
    tokens: Tensor | None = None
    """Logits (B, N, C) of the patch tokens."""
    distill: Tensor | None = None
    """Logits (B, C) of the distillation token."""
    extras: Mapping[str, Tensor] = {}

    def merged(self) -> Tensor:
        """Return the merged logits (B, C) of all heads, as in the papers.

        This is the mean of class and distillation logits (DeiT), plus half the maximum over the token logits (LV-ViT).
        """
        logits = self.cls if self.distill is None else (self.cls + self.distill) / 2
        return logits if self.tokens is None else logits + TOKEN_WEIGHT * self.tokens.amax(1)

    def chunk(self, passes: int) -> list[Outputs]:
        """Split outputs (passes * B, ...) of a batch repeated `passes` times into one `Outputs` (B, ...) per pass."""

        def part(logits: Tensor | None, number: int) -> Any:
            return None if logits is None else logits.chunk(passes)[number]

        return [
            Outputs(
                part(self.cls, number),
                part(self.tokens, number),
                part(self.distill, number),
                {name: part(value, number) for name, value in self.extras.items()},
            )
            for number in range(passes)
        ]


class SparseTokens(NamedTuple):
    """Probabilities (B, N, C) of patch tokens in which all but a few classes share one value.

    The probability of class c is `base` plus the `weights` of the entries whose class is c.
    """

    classes: Tensor
    """(B, N, E) int64."""
    weights: Tensor
    """(B, N, E)."""
    base: Tensor
    """(B, N)."""
    num_classes: int

    def to_dense(self) -> Tensor:
        """Return the probabilities as one tensor (B, N, C)."""
        dense = self.base[..., None].expand(*self.base.shape, self.num_classes).clone()
        return dense.scatter_add_(2, self.classes, self.weights)

    def mixed(self, share: Tensor) -> SparseTokens:
        """Return the targets (B, N, C) mixed with those of the reversed batch.

        Args:
            share: (B, N) or broadcastable: weight of each token's own target; the other image's target has weight
                1 - share.
        """
        share = share.expand_as(self.base)
        return SparseTokens(
            torch.cat((self.classes, self.classes.flip(0)), dim=2),
            torch.cat((self.weights * share[..., None], self.weights.flip(0) * (1 - share)[..., None]), dim=2),
            self.base * share + self.base.flip(0) * (1 - share),
            self.num_classes,
        )


class Targets(NamedTuple):
    """Targets of an objective, built by `vitrail.training.TargetBuilder`.

    `cls` is always set. The others are set only if the objective declares that it needs them.
    """

    cls: Tensor
    """Class indices (B,) or probabilities (B, C); for segmentation class indices (B, H, W), or `MASK_IGNORE`."""
    tokens: Tensor | SparseTokens | None = None
    """`token_targets`: probabilities (B, N, C) of the patch tokens, dense or sparse; (B, 1, C) if shared."""
    teacher_logits: Tensor | None = None
    """`teacher_logits`: (B, C), in the student's class order."""
    teacher_features: Tensor | None = None
    """`teacher_features`: patch tokens (B, N, D) of the teacher, in row-major order; on the grid of the student's
    tokens if the objective also uses `outputs.features`."""
    teacher_heads: Outputs | None = None
    """`teacher_heads`: logits of each of the teacher's heads, in the student's class order."""
