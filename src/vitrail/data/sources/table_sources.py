"""Sources and splits of encoded images in a few large files, whose places are listed in a table.

Shapes: N images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitrail.data.bit_depth import ValueRange
from vitrail.data.images import decode_image
from vitrail.data.sources.contract import Encoded, Split, SplitName
from vitrail.data.sources.tables import Table
from vitrail.errors import ConfigError
from vitrail.types import Sample


class TableSplit:
    """Base class of splits of listed images; a subclass reads their files in `encoded`.

    Args:
        table: where each image is, with labels and keys.
        value_range: see `read_image`.
    """

    def __init__(self, table: Table, value_range: ValueRange | Literal["type"] | None) -> None:
        self.table = table
        self.value_range: ValueRange | Literal["type"] = value_range or "type"

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        return self.table.labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        encoded = self.encoded(index)
        image = decode_image(encoded.data, encoded.name, self.value_range)
        return Sample(image, int(self.table.labels[index]), self.table.keys[index])

    def encoded(self, index: int) -> Encoded:
        """Return the file of an image as it is stored.

        Raises:
            ImageError: it cannot be read.
        """
        raise NotImplementedError

    def keys(self) -> Sequence[str]:
        """Return the keys of all samples, in order; each is decoded when it is asked for."""
        return self.table.keys


class TableSource:
    """Base class of sources that list a split's images when they open it.

    Attributes:
        files: files of each split; without training data, only those of `val`.
        index: folder that caches the lists; None lists the images at every start.
        wanted: what `data.source.train` is, for the error message.
    """

    files: Mapping[SplitName, Any]
    index: Path | None
    wanted: str

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Splits that have files."""
        return ("train", "val") if "train" in self.files else ("val",)

    def prepare(self) -> None:
        """List the images once, if the lists are cached for the other processes."""
        if self.index:
            for split in self.splits:
                self.open(split)

    def open(self, split: SplitName) -> Split:
        """Return a split, listing its images."""
        raise NotImplementedError

    def files_of(self, split: SplitName) -> Any:
        """Return the files of a split.

        Raises:
            ConfigError: there is no training data.
        """
        if split not in self.files:
            raise ConfigError(f"data.source.train: not set, so there is no training data. Set it to {self.wanted}.")
        return self.files[split]
