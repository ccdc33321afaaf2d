"""Swap tokens between the images of a batch: MixToken (Jiang et al., arXiv:2104.10858, section 3.2).

Shapes: B images, N patch tokens, D channels, h x w cells of the token grid.
"""

import torch
from torch import Tensor


def mix_tokens(x: Tensor, box: Tensor, grid: tuple[int, int]) -> Tensor:
    """Swap the tokens inside a box with those of the reversed batch: sample i with sample B - 1 - i.

    Applying it twice restores the input.

    Args:
        x: tokens (B, N, D) of a grid in row-major order, or (B, h, w, D).
        box: (4,) integers top, left, bottom, right in cells; bottom and right are outside the box.
        grid: rows and columns (h, w).

    Returns:
        The swapped tokens, in the shape of `x`.
    """
    rows = torch.arange(grid[0], device=x.device)[:, None]
    columns = torch.arange(grid[1], device=x.device)[None, :]
    top, left, bottom, right = box.to(x.device).unbind()
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    inside = inside.flatten()[:, None] if x.ndim == 3 else inside[:, :, None]
    return torch.where(inside, x.flip(0), x)
