"""Interface of data sets: a source with class names that opens a training and a validation split."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrail.types import Sample

SplitName = Literal["train", "val"]


class Split(Protocol):
    """One split: a sequence of samples."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def keys(self) -> list[str]:
        """Return the keys of all samples, in order."""
        ...


class Source(Protocol):
    """A data set: its class names in the order of the class indices, and its splits."""

    classes: list[str]

    def open(self, split: SplitName) -> Split:
        """Return the training or validation split."""
        ...

    def prepare(self) -> None:
        """Download missing files; called on one process only."""
        ...
