"""Targets of class token and patch tokens from label maps and crops (Jiang et al., arXiv:2104.10858).

A label map has a grid of cells over the whole image, each with the annotator's top K raw scores and their classes. The
crop of the map is pooled to the token grid, and to one cell for the class token, as torchvision's RoIAlign does. A
softmax over all classes, with score 0 for absent ones, gives probabilities, which are then smoothed.

RoIAlign weights rows and columns independently of each other and of the values. Pooling is therefore a product with two
small matrices per image, computed for the whole batch at once on its device.

Numerically equal to the official code (github.com/zihangJiang/TokenLabeling, commit 9dbfd59) on square maps, with one
difference: here the crop of the map is where the image was cropped, while the official code passes (top, left, height,
width) to a function that expects x first. `transpose_crops=True` gives the published behaviour.

Shapes: B images, K scores per cell, H x W cells, h x w tokens, N = h * w, C classes; R x Q cells that can overlap a
token.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.types import SparseTokens


class TokenTargets(NamedTuple):
    """Probabilities for the class token (B, C) and the patch tokens (B, N, C)."""

    cls: Tensor
    tokens: Tensor


class SparseTokenTargets(NamedTuple):
    """Probabilities for the class token (B, C) and the patch tokens (B, N, C), the latter in sparse form."""

    cls: Tensor
    tokens: SparseTokens


def token_targets(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.1,
    transpose_crops: bool = False,
) -> TokenTargets:
    """Return the dense targets (B, C) and (B, N, C); `sparse_token_targets` avoids the (B, N, C) tensor.

    Args:
        scores: (B, K, H, W), the annotator's raw scores.
        classes: (B, K, H, W) integers, the class of each score; each class occurs at most once in a cell.
        boxes: (B, 4), the crop as (x1, y1, x2, y2), each in [0, 1] of the (flipped) image.
        flipped: (B,) bool, True if the image was mirrored left to right before it was cropped.
        grid: rows and columns of tokens (h, w).
        num_classes: C.
        smoothing: s; probabilities p become p * (1 - s + s / C) + s / C, as published: they sum to 1 + s / C.
        transpose_crops: exchange x and y of the boxes, as the official code does.

    Raises:
        ValueError: the shapes do not match, or a class is outside 0 to C - 1.
    """
    rows, columns = _pooling(scores, classes, boxes, flipped, grid, num_classes, transpose_crops)
    maps = scores.new_zeros(len(scores), num_classes, *scores.shape[2:], dtype=torch.float32)
    maps.scatter_add_(1, classes.long(), scores.float())
    pooled = torch.einsum("biy,bcyx,bjx->bijc", rows, maps, columns).flatten(1, 2)  # (B, N, C)
    return TokenTargets(
        _class_target(scores, classes, boxes, flipped, num_classes, smoothing, transpose_crops),
        _smooth(pooled.softmax(-1), smoothing),
    )


def sparse_token_targets(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.1,
    transpose_crops: bool = False,
) -> SparseTokenTargets:
    """Return the targets of `token_targets`, those of patch tokens in sparse form.

    Each patch token has the few classes that occur in its cells, and one value for all other classes. With an (18, 18)
    map and a 14 x 14 grid, a token overlaps at most 3 x 3 cells of K classes, for any C.
    """
    rows, columns = _pooling(scores, classes, boxes, flipped, grid, num_classes, transpose_crops)
    height, width = scores.shape[2:]
    first_row, row_weights = _windows(rows, _reach(height, grid[0]))  # (B, h), (B, h, R)
    first_column, column_weights = _windows(columns, _reach(width, grid[1]))  # (B, w), (B, w, Q)
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]  # (B, h, w, R, Q)
    y = (first_row[..., None] + torch.arange(row_weights.shape[-1], device=scores.device)).clamp_(max=height - 1)
    x = (first_column[..., None] + torch.arange(column_weights.shape[-1], device=scores.device)).clamp_(max=width - 1)
    cells = (y[:, :, None, :, None] * width + x[:, None, :, None, :]).flatten(1)  # (B, N * R * Q)
    top_k = scores.shape[1]
    at = cells[:, None].expand(-1, top_k, -1)
    entries = (len(scores), top_k, grid[0] * grid[1], -1)
    found = classes.flatten(2).long().gather(2, at).reshape(entries).movedim(1, 2).flatten(2)  # (B, N, K * R * Q)
    values = scores.flatten(2).float().gather(2, at).reshape(entries) * weights.flatten(3).flatten(1, 2)[:, None]
    found, pooled = _merge(found, values.movedim(1, 2).flatten(2))
    highest = pooled.amax(-1, keepdim=True).clamp_(min=0)  # absent classes have score 0
    absent = (-highest).exp()
    excess = (pooled - highest).exp_() - absent
    total = excess.sum(-1, keepdim=True) + num_classes * absent
    on = 1 - smoothing + smoothing / num_classes
    base = (on * absent / total).squeeze(-1) + smoothing / num_classes
    tokens = SparseTokens(found, on * excess / total, base, num_classes)
    return SparseTokenTargets(
        _class_target(scores, classes, boxes, flipped, num_classes, smoothing, transpose_crops), tokens
    )


def _merge(classes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values (..., E) of equal classes; unused entries have class 0 and value 0."""
    classes, order = classes.sort(-1)
    values = values.gather(-1, order)
    new = torch.ones_like(classes, dtype=torch.bool)
    new[..., 1:] = classes[..., 1:] != classes[..., :-1]
    place = new.cumsum(-1) - 1
    merged = torch.zeros_like(values).scatter_add_(-1, place, values)
    return torch.zeros_like(classes).scatter_(-1, place, classes), merged


def _class_target(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    num_classes: int,
    smoothing: float,
    transpose_crops: bool,
) -> Tensor:
    """Return the target of the class token (B, C)."""
    pooled = pooled_scores(scores, classes, boxes, flipped, num_classes, transpose_crops)
    return _smooth(pooled.softmax(-1), smoothing)


def pooled_scores(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    num_classes: int,
    transpose_crops: bool = False,
) -> Tensor:
    """Return the raw scores (B, C) of the crop, pooled to one cell; 0 for classes that occur in none of its cells.

    The arguments are those of `token_targets`.
    """
    rows, columns = _pooling(scores, classes, boxes, flipped, (1, 1), num_classes, transpose_crops)
    weighted = scores.float() * (rows.transpose(1, 2) * columns)[:, None]  # (B, K, H, W)
    pooled = weighted.new_zeros(len(scores), num_classes)
    return pooled.scatter_add_(1, classes.long().flatten(1), weighted.flatten(1))


def _smooth(probabilities: Tensor, smoothing: float) -> Tensor:
    off = smoothing / probabilities.shape[-1]
    return probabilities * (1 - smoothing + off) + off


def _pooling(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    transpose_crops: bool,
) -> tuple[Tensor, Tensor]:
    """Return RoIAlign as two matrices: rows (B, h, H) and columns (B, w, W)."""
    if scores.ndim != 4 or scores.shape != classes.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and classes {tuple(classes.shape)} must both be (B, K, H, W).")
    if boxes.shape != (len(scores), 4) or flipped.shape != (len(scores),):
        raise ValueError(f"boxes {tuple(boxes.shape)} and flipped {tuple(flipped.shape)} must be (B, 4) and (B,).")
    if scores.device.type == "cpu" and classes.numel():
        highest = int(classes.numpy().max())
        if not 0 <= highest < num_classes:
            raise ValueError(f"label maps contain class {highest}, but the data has {num_classes} classes.")
    x1, y1, x2, y2 = boxes.float().unbind(1)
    if transpose_crops:
        x1, y1, x2, y2 = y1, x1, y2, x2
    rows = _axis_weights(y1, y2, scores.shape[2], grid[0])
    columns = _axis_weights(x1, x2, scores.shape[3], grid[1])
    return rows, torch.where(flipped[:, None, None], columns.flip(-1), columns)  # a mirrored map is read backwards


def _axis_weights(start: Tensor, end: Tensor, cells: int, bins: int) -> Tensor:
    """Return the weights (B, bins, cells) with which RoIAlign averages the cells of one axis.

    As torchvision's `roi_align` with `aligned=False` and `sampling_ratio=-1`, on corners shifted by half a cell. A side
    has at least one cell. Each bin has ceil(bin size) samples, at the centres of equal parts, interpolated linearly
    between cell centres. Samples up to one cell outside the border take the border's value; further out they are 0.
    """
    low = start * cells - 0.5
    side = (end * cells - 0.5 - low).clamp(min=1.0)
    size = side / bins  # (B,)
    count = (side / bins).ceil().clamp(max=_samples(cells, bins))  # samples in a bin
    sample = torch.arange(_samples(cells, bins), device=start.device)
    position = torch.arange(bins, device=start.device)[:, None] + (sample + 0.5) / count[:, None, None]
    position = low[:, None, None] + position * size[:, None, None]  # (B, bins, samples)
    used = (sample < count[:, None, None]) & (position >= -1) & (position <= cells)
    position = position.clamp(0, cells - 1)
    lower = position.floor()
    fraction = position - lower
    share = used / count[:, None, None]
    weights = start.new_zeros(len(start), bins, cells)
    weights.scatter_add_(2, lower.long(), share * (1 - fraction))
    return weights.scatter_add_(2, (lower.long() + 1).clamp(max=cells - 1), share * fraction)


def _samples(cells: int, bins: int) -> int:
    """Return the maximum number of samples in a bin of a crop inside the image, with a margin for rounding."""
    return math.ceil(cells / bins + 1e-4)


def _reach(cells: int, bins: int) -> int:
    """Return how many cells a bin can use: samples are at most one cell apart and interpolate between two cells."""
    return min(cells, _samples(cells, bins) + 1)


def _windows(weights: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Return the first cell (B, bins) with a weight, and the weights (B, bins, reach) from there, 0 past the border."""
    cells = weights.shape[-1]
    first = (weights > 0).int().argmax(-1)
    at = first[..., None] + torch.arange(reach, device=weights.device)
    return first, weights.gather(-1, at.clamp(max=cells - 1)) * (at < cells)
