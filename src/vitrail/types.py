"""What flows through the house: samples out of `data`, heads out of `models`, targets into `objectives`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """One image or, collated, a batch of them.

    `key` ties an image to everything else that is known about it, in any storage (`n01440764/n01440764_10026`).
    """

    image: Any  # PIL image from a source; then (3, H, W); in a batch (B, 3, H, W)
    label: Any  # class index; in a batch (B,) int64, or (B, C) probabilities once mixed; IGNORE where not to count
    key: Any  # str; in a batch a list of B of them
    label_map: Any = ()  # LabelMap where the data has label maps
    share: Any = ()  # once label maps are mixed with their images: (B, H, W), share of its own image in each pixel


Box = tuple[float, float, float, float]
"""x1, y1, x2, y2, each in [0, 1] of the (mirrored) image."""


class Warp(NamedTuple):
    """A rotation, shear or shift of RandAugment; coordinates x, y in [0, 1] of the (mirrored) image."""

    matrix: tuple[float, float, float, float, float, float]  # at (x, y) stands what was at (ax + by + c, dx + ey + f)
    bounds: Box  # of the picture that was warped: what comes from outside of it is filled with grey


class View(NamedTuple):
    """What augmentation did to the geometry: mirror the image or not, warp it, and cut this box out of it."""

    box: Box
    flipped: bool
    warps: tuple[Warp, ...] = ()  # in their order


class LabelMap(NamedTuple):
    """The annotator's top K of an image and the view of it that the network gets; tensors, collated to a batch."""

    scores: Tensor  # (K, H, W) float16
    classes: Tensor  # (K, H, W) int32
    box: Tensor  # (4,) float32, see View
    flipped: Tensor  # () bool


IGNORE = -1
"""Label of a sample that only fills a batch: it counts in no loss and no metric."""


class Heads(NamedTuple):
    """Logits of a backbone: class token (or pooled) (B, C), patch tokens (B, N, C), distillation token (B, C)."""

    cls: Tensor
    tokens: Tensor | None = None
    distill: Tensor | None = None

    def merged(self) -> Tensor:
        """The logits (B, C) that an image is judged by, which `model(images)` gives: every published way in one.

        Mean of class and distillation logits (DeiT), plus half the maximum over the tokens (LV-ViT).
        """
        logits = self.cls if self.distill is None else (self.cls + self.distill) / 2
        return logits if self.tokens is None else logits + TOKEN_WEIGHT * self.tokens.amax(1)


TOKEN_WEIGHT = 0.5
"""Weight of the maximum over token logits in the logits of an image (arXiv:2104.10858, official code)."""


class SparseTokens(NamedTuple):
    """Probabilities (B, N, C) of patch tokens, of which all but a few classes share one value.

    The probability of class c is `base` plus the `weights` of the entries whose class is c.
    """

    classes: Tensor  # (B, N, E) int64
    weights: Tensor  # (B, N, E)
    base: Tensor  # (B, N)
    num_classes: int

    def to_dense(self) -> Tensor:
        """(B, N, C)."""
        dense = self.base[..., None].expand(*self.base.shape, self.num_classes).clone()
        return dense.scatter_add_(2, self.classes, self.weights)

    def mixed(self, share: Tensor) -> "SparseTokens":
        """Mix with the batch's mirror image: `share` (B, N) or broadcastable of each token's own target."""
        share = share.expand_as(self.base)
        return SparseTokens(
            torch.cat((self.classes, self.classes.flip(0)), dim=2),
            torch.cat((self.weights * share[..., None], self.weights.flip(0) * (1 - share)[..., None]), dim=2),
            self.base * share + self.base.flip(0) * (1 - share),
            self.num_classes,
        )


class Targets(NamedTuple):
    """What the heads should say: class indices (B,) or probabilities (B, C), and token probabilities.

    Those of tokens are dense (B, N, C) or sparse. `truth` (B, C) is what the data set says beside an annotator's `cls`.
    `share` is what MixToken left of its own image in each class token: the rest belongs to the batch's mirror image.
    `teacher` (B, C) are the logits of a teacher for these images.
    """

    cls: Tensor
    tokens: Tensor | SparseTokens | None = None
    truth: Tensor | None = None
    share: Tensor | float | None = None
    teacher: Tensor | None = None
