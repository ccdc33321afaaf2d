"""Splits whose images are ranges of bytes in a few large files: archives and packs.

Shapes: N images.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from vitrail.data.bit_depth import ValueRange
from vitrail.data.sources.contract import Encoded
from vitrail.data.sources.table_sources import TableSplit
from vitrail.data.sources.tables import Table
from vitrail.errors import ImageError

_OPEN = 64  # files that are open at the same time in a process; a system's limit may be 256


class Files:
    """Read ranges of bytes from files, which are opened when they are needed; safe in threads and forked processes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        # A file that drops out of the cache closes once the last thread has finished reading from it.
        self._open = lru_cache(_OPEN)(lambda number: FileIO(self.paths[number]))

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.paths,)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of file `number`, from `offset` on.

        Raises:
            ImageError: they cannot be read, or the file ends before them.
        """
        path = self.paths[number]
        try:
            file = self._open(number)
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror}).") from error
        if len(data) != size:
            raise ImageError(f"{path}: is cut short, it ends before byte {offset + size}; copy the file again.")
        return data


class RangeSplit(TableSplit):
    """Split of encoded images in a few large files.

    Args:
        paths: the files.
        table: where each image is, with labels and keys.
        value_range: see `read_image`.
    """

    label_sets: Sequence[tuple[int, ...]] | None = None

    def __init__(
        self, paths: Sequence[Path], table: Table, value_range: ValueRange | Literal["type"] | None = "type"
    ) -> None:
        super().__init__(table, value_range)
        self.files = Files(paths)

    def encoded(self, index: int) -> Encoded:
        """Return the file of an image as it is stored.

        Raises:
            ImageError: it cannot be read.
        """
        table = self.table
        number = int(table.file[index])
        data = self.files.read(number, int(table.offset[index]), int(table.size[index]))
        return Encoded(data, f"{self.files.paths[number]}: {table.keys[index]}")
