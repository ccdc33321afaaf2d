"""Datasets of features that a frozen network has computed once, in place of the images.

Shapes: N images, B images of a batch, D features, H x W pixels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.data.dataset import ViewDataset
from vitrail.data.sampling import Draw
from vitrail.types import IGNORE, Batch, Item


class CachedFeatures(Dataset[Item]):
    """Dataset of the features (D,) of images under a deterministic transform; `compute` fills it.

    Args:
        images: the images.
    """

    features: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64."""
    maps = None
    """No label maps."""

    def __init__(self, images: ViewDataset) -> None:
        self.images, self.split = images, images.split

    def __len__(self) -> int:
        return len(self.images)

    def compute(
        self, batches: Iterable[Batch], extract: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]
    ) -> None:
        """Compute the features; collective, every process computes its share and keeps all.

        Args:
            batches: this process's part of the images, in the order of an unshuffled `EpochSampler`.
            extract: maps images (B, 3, H, W) to features (B, D).
            gather: maps a tensor (B, ...) to that of every process, (processes, B, ...).
        """
        found: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            parts = (extract(batch.image).float(), batch.label)
            features, labels = (gather(part).cpu().transpose(0, 1).flatten(0, 1) for part in parts)
            found.append((features, labels))
        features, labels = (torch.cat(parts)[: len(self)] for parts in zip(*found, strict=True))
        self.features, self.labels, self.keys = features, labels, self.split.keys()

    def __getitem__(self, draw: Draw) -> Item:
        index = draw.sample
        label = IGNORE if draw.padding else int(self.labels[index])
        return Item(self.features[index], label, self.keys[index])
