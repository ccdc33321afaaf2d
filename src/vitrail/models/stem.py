"""Base class for stems: timm's patch-embedding interface for stems with more than one convolution.

Shapes: B images, C channels, H x W pixels, N tokens, D channels of a token.
"""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn


class Stem(nn.Module):
    """Base class of stems, which turn images (B, C, H, W) into tokens (B, N, D).

    `dynamic_feat_size` gives the token grid for any image size, so that position tables also fit images that are not
    square and sides that are not a multiple of the stride.

    Args:
        img_size: side of the images in pixels, or (height, width).
        patch_size: pixels between neighbouring tokens.
        strict_img_size: refuse images of another size (the position table fits one grid).
        output_fmt: "NHWC" keeps the grid, as timm's `dynamic_img_size` needs; None flattens it.
        kwargs: arguments that timm passes to every patch embedding; ignored.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.strict_img_size = strict_img_size
        self.flatten = output_fmt is None
        self._fit(img_size)

    def _fit(self, img_size: int | tuple[int, int]) -> None:
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of tokens for an image of (height, width) pixels."""
        raise NotImplementedError

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the pixels between neighbouring tokens."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Change the expected image size.

        Raises:
            ValueError: the patch size differs; the strides of a stem are part of its architecture.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size={patch_size}: the stem {type(self).__name__} has fixed strides; use {self.patch_size}."
            )
        if img_size is not None:
            self._fit(img_size)

    def check(self, images: Tensor) -> None:
        """Raise an AssertionError for images (B, C, H, W) that do not fit the position table."""
        height, width = images.shape[-2:]
        if self.strict_img_size:
            fits = height == self.img_size[0] and width == self.img_size[1]
            torch._assert(
                fits, f"images of {height}x{width} pixels do not fit a model built for img_size={self.img_size}."
            )
