"""Training images that are held out, to choose between hyper-parameters without the validation images.

Shapes: N images of a part.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.data.sources import Split
from vitrail.errors import ConfigError
from vitrail.types import Sample


class Part:
    """Split of some samples of another split.

    Args:
        split: the other split.
        indices: indices of the samples, in order.
    """

    def __init__(self, split: Split, indices: Sequence[int]) -> None:
        self.split, self.indices = split, list(indices)
        self.value_range = getattr(split, "value_range", "type")

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        return np.asarray(self.split.labels)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.split[self.indices[index]]

    def keys(self) -> Sequence[str]:
        """Return the keys of all samples, in order."""
        keys = self.split.keys()
        return [keys[index] for index in self.indices]


def hold_out(split: Split, share: float, seed: int, key: str) -> tuple[Part, Part]:
    """Divide a split at random into the samples to train on and those that are held out.

    Args:
        split: all training samples.
        share: share of the samples to hold out.
        seed: seed of the choice.
        key: config key of `share`, for the error message.

    Raises:
        ConfigError: one of the parts would be empty.
    """
    count = round(share * len(split))
    if not 0 < count < len(split):
        raise ConfigError(f"{key}={share:g}: holds out {count} of {len(split)} training images; change the share.")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    kept, held = sorted(order[count:].tolist()), sorted(order[:count].tolist())
    return Part(split, kept), Part(split, held)
