"""Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899) of a batch: timm's, seeded.

And MixToken (Jiang et al., arXiv:2104.10858), which mixes tokens behind the stem rather than pixels before it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from vitrail.data.randomness import seeded
from vitrail.errors import ConfigError


class Mixing:
    """Mix each image of a batch with its mirror in the batch order, and the targets alike.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns mixup off.
        cutmix: alpha of CutMix's Beta distribution; 0 turns CutMix off.
        prob: probability that a batch (or pair, or element) is mixed at all.
        switch_prob: probability of CutMix rather than mixup where both are on.
        mode: `batch`, `pair` or `elem`: what shares one draw.
        tokens: how targets of patch tokens are mixed: by `position`, each as its own pixels are; or as `published` in
            LV-ViT's code, all by the share that the whole image has left.

    Raises:
        ConfigError: both are off.
    """

    def __init__(
        self,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        tokens: str = "position",
    ) -> None:
        if mixup <= 0 and cutmix <= 0:
            raise ConfigError("augment.mix: mixup and cutmix are both 0; set augment.mix=null instead.")
        if mode not in ("batch", "pair", "elem"):
            raise ConfigError(f"augment.mix.mode={mode}: must be batch, pair or elem.")
        if tokens not in ("position", "published"):
            raise ConfigError(f"augment.mix.tokens={tokens}: must be position or published.")
        self.tokens = tokens
        self.options = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "prob": prob, "switch_prob": switch_prob}
        self.mode = mode

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mixed images (B, C, H, W), changed in place, and probabilities (B, num_classes) without label smoothing.

        Args:
            images: (B, C, H, W), B even.
            labels: (B,) class indices.
            num_classes: C of the targets.
            key: the draws are a function of it: (seed, step, rank).
        """
        mixup = Mixup(**self.options, mode=self.mode, label_smoothing=0.0, num_classes=num_classes)
        if len(images) == 1:  # nothing to mix with
            return images, F.one_hot(labels, num_classes).to(images.dtype)
        with seeded(*key):
            return mixup(images, labels)

    def shares(self, images: Tensor, key: tuple[int, ...]) -> Tensor:
        """What the same key leaves of each image in itself: (B, H, W), from 0 to 1.

        Read off two colours: the first half of a batch is black, its mirror image white.
        """
        count = len(images)
        second = (torch.arange(count, device=images.device) >= count // 2).to(images.dtype)
        colours = second[:, None, None, None].repeat(1, 1, *images.shape[2:])
        mixed = self(colours, torch.zeros(count, dtype=torch.long, device=images.device), 2, key)[0][:, 0]
        return torch.where(second[:, None, None] > 0, mixed, 1 - mixed)

    def token_shares(self, shares: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is left of its own image in the target of each token (B, N), from the shares of pixels (B, H, W)."""
        if self.tokens == "published":
            return shares.mean((1, 2))[:, None].expand(-1, grid[0] * grid[1])
        return F.adaptive_avg_pool2d(shares[:, None], grid).flatten(1)


class MixToken:
    """Draws the box of tokens that each image of a batch exchanges with its mirror in the batch order.

    Args:
        alpha: of the Beta distribution of the share that stays.
        whole_sides: sides as long as the share asks for; False as published, where each half of a side is rounded down,
            so that sides are even. What leaves the grid is cut off in both: the mean area is 0.27, or 0.29 with whole
            sides, where the share alone would give 0.5.

    Raises:
        ConfigError: alpha is not positive.
    """

    def __init__(self, alpha: float = 1.0, whole_sides: bool = False) -> None:
        if alpha <= 0:
            raise ConfigError(f"augment.mix.alpha={alpha}: must be positive; augment.mix=null turns MixToken off.")
        self.alpha, self.whole_sides = alpha, whole_sides

    def box(self, grid: tuple[int, int], key: tuple[int, ...]) -> tuple[Tensor, float]:
        """The box (4,) of top, left, bottom, right in cells of (rows, columns), and the share of tokens outside it.

        A function of `key`: (seed, step, rank).
        """
        box = self.draw(grid, np.random.RandomState(np.random.SeedSequence(key).generate_state(1)))
        top, left, bottom, right = box
        return torch.tensor(box), 1 - (bottom - top) * (right - left) / (grid[0] * grid[1])

    def draw(self, grid: tuple[int, int], random: np.random.RandomState) -> tuple[int, int, int, int]:
        """One box, with the draws of the official code in their order."""
        cut = np.sqrt(1 - random.beta(self.alpha, self.alpha))
        sides = [int(side * cut) for side in grid]
        ends: list[tuple[int, int]] = []
        for side, length in zip(grid, sides, strict=True):
            middle, half = random.randint(side), length // 2
            far = middle + (length - half if self.whole_sides else half)
            ends.append((max(middle - half, 0), min(far, side)))
        return ends[0][0], ends[1][0], ends[0][1], ends[1][1]
