"""What timm's VisionTransformer asks of a patch embedding, for stems that are more than one convolution."""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn


class Stem(nn.Module):
    """Base of the stems that turn an image (B, 3, H, W) into tokens (B, N, D).

    A stem knows which grid of tokens an image of any size gives (`dynamic_feat_size`), so that position tables fit
    images that are not square and sides that are no multiple of its stride.

    Args:
        img_size: side of the images in pixels, or (height, width).
        patch_size: pixels between neighbouring tokens.
        strict_img_size: refuse images of another size (the position table fits one grid).
        output_fmt: "NHWC" keeps the grid, for timm's `dynamic_img_size`; None flattens it.
        kwargs: what timm passes to every patch embedding and stems have no use for.
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
        """Rows and columns of tokens that an image of (height, width) pixels gives."""
        raise NotImplementedError

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels between neighbouring tokens."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Expect images of another size from now on.

        Raises:
            ValueError: another patch size is asked for; the strides of a stem are part of its architecture.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size={patch_size}: the stem {type(self).__name__} cannot change its strides.")
        if img_size is not None:
            self._fit(img_size)

    def check(self, images: Tensor) -> None:
        """Refuse images (B, C, H, W) that the position table does not fit."""
        height, width = images.shape[-2:]
        if self.strict_img_size:
            fits = height == self.img_size[0] and width == self.img_size[1]
            torch._assert(fits, f"Images of {height}x{width} pixels reach a model built for img_size={self.img_size}.")
