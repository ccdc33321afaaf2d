"""Triton kernels of the renderer, with Pillow's arithmetic.

All images lie in one flat tensor of pixels (P, 3) uint8 without padding, and all numbers of their views in one float64
tensor, so that a kernel serves images of different sizes and needs only places in these tensors: a whole batch takes
some twenty launches. Kernels change the pixels in place. They are compiled without contraction of products and sums,
which would round differently from Pillow: `OPTIONS`.

The first index of a program is the image among those of an operation, the second a block of its pixels.
"""

from typing import Any

from vitrail.data.render.kernels.changes import blur, color, copy, flip, look_up, make_tables, sharpness
from vitrail.data.render.kernels.finishing import erase, normalise
from vitrail.data.render.kernels.geometry import affine
from vitrail.data.render.kernels.resizing import coefficients, resize

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of a launch."""

BLOCK = 1024
"""Pixels of a program."""

__all__ = [
    "BLOCK",
    "OPTIONS",
    "affine",
    "blur",
    "coefficients",
    "color",
    "copy",
    "erase",
    "flip",
    "look_up",
    "make_tables",
    "normalise",
    "resize",
    "sharpness",
]
