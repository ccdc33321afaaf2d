"""Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899) of a batch: timm's, seeded."""

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
    ) -> None:
        if mixup <= 0 and cutmix <= 0:
            raise ConfigError("augment.mix: mixup and cutmix are both 0; set augment.mix=null instead.")
        if mode not in ("batch", "pair", "elem"):
            raise ConfigError(f"augment.mix.mode={mode}: must be batch, pair or elem.")
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
