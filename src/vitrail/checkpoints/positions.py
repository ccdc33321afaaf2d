"""Resize position embeddings to the grid of patch tokens of another image size.

Shapes: N patch tokens, D channels.
"""

import math
from typing import Any

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vitrail.checkpoints.reading import Origin
from vitrail.errors import ConfigError


def position_tables(model: Any) -> list[str]:
    """Return the keys of a backbone's position embeddings: those that it declares, or `pos_embed`."""
    declared = getattr(model, "position_grids", None)
    return ["pos_embed"] if declared is None else list(declared())


def fit_positions(
    key: str, table: Tensor, own: Tensor, model: Any, source: str, origin: Origin
) -> tuple[Tensor, str | None]:
    """Resize the position embeddings `key` (1, prefix + N, D), or (1, rows, columns, D), to the model's grid.

    Bicubic without antialiasing (coefficient -0.75), as in the official scripts. timm's default antialiases, which
    changes values by up to a third of their standard deviation.

    Returns:
        The table, and what was done to it; None if nothing was.
    """
    if table.ndim == 4:
        if table.shape == own.shape:
            return table, None
        rows, columns = own.shape[1:3]
        resized = F.interpolate(table.permute(0, 3, 1, 2), (rows, columns), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1), _resized(tuple(table.shape[1:3]), (rows, columns))
    declared = getattr(model, "position_grids", None)
    grid_size = declared()[key] if declared else getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid_size is None:
        return table, None
    new = int(grid_size[0]), int(grid_size[1])
    prefix = own.shape[1] - new[0] * new[1]  # CaiT and others count a class token that has no position
    if not 0 <= prefix < table.shape[1]:  # a table of another kind
        return table, None
    count, side = table.shape[1] - prefix, math.isqrt(table.shape[1] - prefix)
    old, known = _recorded_grid(key, model, origin, count), True
    if old is None:
        old, known = (side, side), False
        if side * side != count:
            if count == new[0] * new[1]:
                return table, None
            raise ConfigError(
                f"{source}: {table.shape[1]} position embeddings do not form a square grid and cannot be resized;"
                " use the image size of the checkpoint."
            )
    if old == new:
        return table, None
    resized = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix, antialias=False)
    return resized, _resized(old, new, known)


def _resized(old: tuple[int, ...], new: tuple[int, int], known: bool = True) -> str:
    assumed = "" if known else " (assumed: the file records no image size)"
    return (
        f"position embeddings resized from {old[0]}x{old[1]}{assumed} to {new[0]}x{new[1]} (bicubic, not antialiased)."
    )


def _recorded_grid(key: str, model: Any, origin: Origin, count: int) -> tuple[int, int] | None:
    """Return the grid of `count` patch tokens for the recorded image size; None if it is unknown or does not fit."""
    if origin.size is None:
        return None
    patch_embed: Any = getattr(model, "patch_embed", None)
    if hasattr(model, "position_grids"):
        rows, columns = model.position_grids(origin.size)[key]
    elif hasattr(model, "token_grid"):
        rows, columns = model.token_grid(origin.size)
    elif hasattr(patch_embed, "dynamic_feat_size"):
        rows, columns = patch_embed.dynamic_feat_size(origin.size)
    else:
        return None
    return (rows, columns) if rows * columns == count else None
