"""Interface of data sets: a source with class names that opens a training and a validation split.

A source may also declare, found by name:

    splits           the splits that it has, `("val",)` for example; without it, both
    value_range      black and white of images with more than 8 bits per channel, known once a split is open
    describe()       one line about the stored pixels, if they differ from the original files; logged and shown in plans
    storage()        how images are stored, as benchmarks/data_path.py names it: files, packed, packed_256, ...
    damaged()        yields a sentence for each file whose checksum is wrong; the doctor calls it

and a split:

    encoded(index)   the file of an image as it is stored (`Encoded`); packing copies it unchanged
    label_sets       the classes of each image, if an image has several or none, as in ReaL
    value_range      as above, for this split
    ignored          number of files that are not used, by kind
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrail.types import Sample

SplitName = Literal["train", "val"]


class Encoded(NamedTuple):
    """An image file as it is stored."""

    data: bytes
    name: str
    """Name in messages: a path, or an archive and the key in it."""


class Split(Protocol):
    """One split: a sequence of samples."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def keys(self) -> Sequence[str]:
        """Return the keys of all samples, in order; large splits read each key when it is asked for."""
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


def splits_of(source: Source) -> tuple[SplitName, ...]:
    """Return the splits that a source has."""
    return tuple(getattr(source, "splits", ("train", "val")))
