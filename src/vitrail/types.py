"""What flows through the house: samples out of `data`, heads out of `models`, targets into `objectives`."""

from typing import Any, NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """One image or, collated, a batch of them.

    `key` ties an image to everything else that is known about it, in any storage (`n01440764/n01440764_10026`).
    """

    image: Any  # PIL image from a source; then (3, H, W); in a batch (B, 3, H, W)
    label: Any  # class index; in a batch (B,) int64, or (B, C) probabilities once mixed; IGNORE where not to count
    key: Any  # str; in a batch a list of B of them


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


class Targets(NamedTuple):
    """What the heads should say: class indices (B,) or probabilities (B, C), and token probabilities (B, N, C)."""

    cls: Tensor
    tokens: Tensor | None = None
