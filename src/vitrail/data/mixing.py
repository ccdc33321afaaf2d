"""Mixing: one draw per batch, applied alike to pixels, labels, label maps and tokens.

Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899) mix pixels, with timm's draws and
arithmetic; MixToken (Jiang et al., arXiv:2104.10858) mixes tokens after the stem. Image i of a batch is mixed with
image B - 1 - i. "Share" always means the weight of an image's own part, in [0, 1]; its partner has weight 1 - share.

Shapes: B images, H x W pixels, N patch tokens, C classes.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor

from vitrail.data.randomness import seeded
from vitrail.data.transfer import to_device
from vitrail.errors import ConfigError
from vitrail.types import Mix, SparseTokens
from vitrail_runtime.checking import NonNegative, Positive, Share, checked

Key = tuple[int, ...]
"""Random key of the current batch: (seed, batches seen, rank)."""


class Mixing(Protocol):
    """Interface that draws a `Mix` for each training batch."""

    @property
    def needs(self) -> frozenset[str]:
        """Requirements: `token_targets` in the objective, `mixes_tokens` in the backbone."""
        ...

    def for_batch(self, image_shape: torch.Size, grid: tuple[int, int] | None, key: Key) -> Mix | None:
        """Draw for images (B, 3, H, W) with a token grid (rows, columns); None leaves the batch unmixed."""
        ...

    def describe(self) -> str:
        """Return a short description, for logs."""
        ...


@dataclass(frozen=True)
class PixelMix:
    """Mixup and CutMix of a batch.

    Attributes:
        share: weight of each image in its label: one number for all, or (B,) float32.
        boxes: (B, 4) top, bottom, left, right in pixels of the areas that CutMix replaced; None if there are none.
        cut: (B,) bool, CutMix (True) or mixup (False); None if no image uses CutMix.
        image_size: (height, width) in pixels.
        uniform_tokens: give every token the share of its whole image, as published, instead of the share of its pixels.
    """

    share: float | Tensor
    boxes: np.ndarray | None
    cut: np.ndarray | None
    image_size: tuple[int, int]
    uniform_tokens: bool = False
    token_box: None = None

    def images(self, images: Tensor) -> Tensor:
        """Mix images (B, 3, H, W) in place."""
        if isinstance(self.share, float):
            return self._mix_whole_batch(images, self.share)
        original = images.clone()
        for index, share in enumerate(self.share.numpy()):
            partner = len(images) - 1 - index
            if self.boxes is not None and self.cut is not None and self.cut[index]:
                top, bottom, left, right = self.boxes[index]
                images[index][:, top:bottom, left:right] = original[partner][:, top:bottom, left:right]
            elif share != 1:
                images[index] = original[index] * share + original[partner] * (1 - share)
        return images

    def _mix_whole_batch(self, images: Tensor, share: float) -> Tensor:
        if self.boxes is not None:
            top, bottom, left, right = self.boxes[0]
            images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
            return images
        partners = images.flip(0).mul_(1.0 - share)
        return images.mul_(share).add_(partners)

    def probabilities(self, values: Tensor) -> Tensor:
        """Mix values (B, C) by each image's share."""
        share = (
            self.share if isinstance(self.share, float) else to_device(self.share, values.device, values.dtype)[:, None]
        )
        return values * share + values.flip(0) * (1.0 - share)

    def tokens(self, targets: SparseTokens, grid: tuple[int, int]) -> SparseTokens:
        """Mix token targets (B, N, C) by the share of each token's own pixels."""
        return targets.mixed(
            to_device(self.token_shares(len(targets.base), grid), targets.base.device, targets.base.dtype)
        )

    def token_shares(self, count: int, grid: tuple[int, int]) -> Tensor:
        """Return the shares of all tokens (B, N) of B = `count` images on a grid (rows, columns)."""
        whole = torch.as_tensor(self.share, dtype=torch.float32).expand(count)
        if self.uniform_tokens or self.boxes is None or self.cut is None:
            return whole[:, None].expand(-1, grid[0] * grid[1])
        pixels = whole[:, None, None].expand(-1, *self.image_size).clone()
        for index in np.flatnonzero(np.broadcast_to(self.cut, count)):
            top, bottom, left, right = self.boxes[index % len(self.boxes)]
            pixels[index] = 1
            pixels[index, top:bottom, left:right] = 0
        return F.adaptive_avg_pool2d(pixels[:, None], grid).flatten(1)


@checked
class MixupCutMix:
    """Mixup and CutMix of a batch's pixels, with timm's draws from a seeded generator.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns mixup off.
        cutmix: alpha of CutMix's Beta distribution; 0 turns CutMix off.
        prob: probability that a batch (or pair, or element) is mixed at all.
        switch_prob: probability of CutMix instead of mixup if both are on.
        mode: scope of one draw: `batch`, `pair` or `elem`.
        tokens: how to mix targets of patch tokens: `position` uses the share of each token's own pixels; `published`
            uses the share of the whole image for all tokens, as LV-ViT's code does.

    Raises:
        ConfigError: both are off, or a choice is unknown.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        mixup: NonNegative = 0.8,
        cutmix: NonNegative = 1.0,
        prob: Share = 1.0,
        switch_prob: Share = 0.5,
        mode: Literal["batch", "pair", "elem"] = "batch",
        tokens: Literal["position", "published"] = "position",
    ) -> None:
        if mixup <= 0 and cutmix <= 0:
            raise ConfigError("mixing: mixup and cutmix are both 0; set mixing=none instead.")
        self.mixup, self.cutmix, self.prob, self.switch_prob = mixup, cutmix, prob, switch_prob
        self.mode, self.uniform_tokens = mode, tokens == "published"

    def for_batch(self, image_shape: torch.Size, grid: tuple[int, int] | None, key: Key) -> PixelMix | None:
        """Draw for images (B, 3, H, W); None if there is nothing to mix."""
        count, size = image_shape[0], (image_shape[-2], image_shape[-1])
        if count == 1:  # nothing to mix with
            return None
        with seeded(*key):
            if self.mode == "batch":
                return self._draw_batch(size)
            return self._draw_each(count if self.mode == "elem" else count // 2, size)

    def describe(self) -> str:
        """Return a short description, for logs."""
        return " or ".join(
            f"{name} {alpha:g}" for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)) if alpha > 0
        )

    def _draw_batch(self, size: tuple[int, int]) -> PixelMix | None:
        """Make timm's draws for mode=batch, in the same order."""
        if np.random.rand() >= self.prob:
            return None
        cut = self.mixup <= 0 or (self.cutmix > 0 and np.random.rand() < self.switch_prob)
        alpha = self.cutmix if cut else self.mixup
        share = float(np.random.beta(alpha, alpha))
        if share == 1:
            return None
        if not cut:
            return PixelMix(share, None, None, size, self.uniform_tokens)
        box, share = cutmix_bbox_and_lam(size, share)
        return PixelMix(float(share), np.array([box]), np.array([True]), size, self.uniform_tokens)

    def _draw_each(self, draws: int, size: tuple[int, int]) -> PixelMix:
        """Make timm's draws for mode=elem and mode=pair, in the same order."""
        if self.mixup > 0 and self.cutmix > 0:
            cut = np.random.rand(draws) < self.switch_prob
            by_cutmix = np.random.beta(self.cutmix, self.cutmix, size=draws)
            shares = np.where(cut, by_cutmix, np.random.beta(self.mixup, self.mixup, size=draws))
        else:
            cut = np.full(draws, self.cutmix > 0)
            alpha = max(self.mixup, self.cutmix)
            shares = np.random.beta(alpha, alpha, size=draws)
        shares = np.where(np.random.rand(draws) < self.prob, shares.astype(np.float32), np.float32(1))
        boxes = np.zeros((draws, 4), np.int64)
        for index in np.flatnonzero(shares != 1):
            if cut[index]:
                boxes[index], shares[index] = cutmix_bbox_and_lam(size, shares[index])
        if self.mode == "pair":
            shares, cut, boxes = (np.concatenate((part, part[::-1])) for part in (shares, cut, boxes))
        return PixelMix(torch.from_numpy(shares.copy()), boxes, cut, size, self.uniform_tokens)


@dataclass(frozen=True)
class TokenMix:
    """MixToken of a batch.

    Attributes:
        token_box: (4,) top, left, bottom, right in cells: the box of swapped tokens.
        share: weight of an image in its class token: the part of the grid outside the box.
    """

    token_box: Tensor
    share: float

    def images(self, images: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) unchanged: tokens are swapped in the network."""
        return images

    def probabilities(self, values: Tensor) -> Tensor:
        """Mix values (B, C) of the class token, which attends to both images."""
        return self.share * values + (1 - self.share) * values.flip(0)

    def tokens(self, targets: Any, grid: tuple[int, int]) -> Any:
        """Return token targets (B, N, C) unchanged: token logits are swapped back to their own images."""
        return targets


@checked
class MixToken:
    """MixToken: draws the box of tokens that image i of a batch swaps with image B - 1 - i.

    Args:
        alpha: parameter of the Beta distribution of the share that stays.
        whole_sides: use box sides as drawn. False, as published, rounds each half of a side down, so that sides are
            even. The part of the box outside the grid is cut off in both cases: the mean area is 0.27, or 0.29 with
            whole sides, while the drawn share alone would give 0.5.

    Raises:
        ConfigError: alpha is not positive.
    """

    needs = frozenset({"token_targets", "mixes_tokens"})

    def __init__(self, alpha: Positive = 1.0, whole_sides: bool = False) -> None:
        self.alpha, self.whole_sides = alpha, whole_sides

    def for_batch(self, image_shape: torch.Size, grid: tuple[int, int] | None, key: Key) -> TokenMix:
        """Draw one box for a batch of images (B, 3, H, W) with a token grid (rows, columns)."""
        assert grid is not None, "MixToken needs a grid of tokens"
        seed, batches, *rest = key
        return TokenMix(*self.box(grid, (seed, batches + 1, *rest)))  # + 1 keeps the draws of version 0.1

    def describe(self) -> str:
        """Return a short description, for logs."""
        return "MixToken"

    def box(self, grid: tuple[int, int], key: Key) -> tuple[Tensor, float]:
        """Return a box (4,), top, left, bottom, right in cells of a grid (rows, columns), and the share outside it."""
        box = self.draw(grid, np.random.RandomState(np.random.SeedSequence(key).generate_state(1)))
        top, left, bottom, right = box
        return torch.tensor(box), 1 - (bottom - top) * (right - left) / (grid[0] * grid[1])

    def draw(self, grid: tuple[int, int], random: np.random.RandomState) -> tuple[int, int, int, int]:
        """Draw one box (top, left, bottom, right), with the draws of the official code in the same order."""
        cut = np.sqrt(1 - random.beta(self.alpha, self.alpha))
        sides = [int(side * cut) for side in grid]
        ends: list[tuple[int, int]] = []
        for side, length in zip(grid, sides, strict=True):
            middle, half = random.randint(side), length // 2
            far = middle + (length - half if self.whole_sides else half)
            ends.append((max(middle - half, 0), min(far, side)))
        return ends[0][0], ends[1][0], ends[0][1], ends[1][1]
