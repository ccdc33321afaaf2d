"""Tables of images without a Python object per image: arrays that are mapped from files, which all processes share.

Shapes: N images.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_BLOCK = 65_536  # strings that are decoded at a time
COLUMNS = ("file", "offset", "size", "label", "key_text", "key_ends")


class Strings(Sequence[str]):
    """N strings in two arrays, decoded when they are asked for.

    Args:
        text: all strings in UTF-8, one after another.
        ends: (N,) end of each string in `text`, in bytes.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Store strings in arrays."""
        text, ends = bytearray(), array("q")
        for string in strings:
            text += string.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        first = int(self.ends[number - 1]) if number else 0
        return bytes(self.text[first : int(self.ends[number])]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), _BLOCK):
            ends = self.ends[first : first + _BLOCK].tolist()
            base, block = start, bytes(self.text[start : ends[-1]])
            for end in ends:
                yield block[start - base : end - base].decode("utf-8", "surrogateescape")
                start = end


class Table:
    """Where the bytes of N images are, with their labels and keys.

    Args:
        arrays: columns by name: `file` (N,) int32, `offset` and `size` in bytes (N,) int64, `label` (N,) int64, and the
            keys as `key_text` and `key_ends`; a source may add more.
        folder: folder of the files that the arrays are mapped from, if they are.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], folder: Path | None = None) -> None:
        self.arrays, self.folder = arrays, folder
        self.file, self.offset, self.size = arrays["file"], arrays["offset"], arrays["size"]
        self.labels: NDArray[np.int64] = arrays["label"]
        self.keys = Strings(arrays["key_text"], arrays["key_ends"])

    def __len__(self) -> int:
        return len(self.labels)

    # Another process maps the files again; pickling would copy the arrays.
    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            return Table, (self.arrays,)
        return Table.open, (self.folder, tuple(self.arrays))

    @classmethod
    def open(cls, folder: Path, columns: Sequence[str] = COLUMNS) -> "Table":
        """Map the columns from the files in `folder`.

        Raises:
            OSError, ValueError, EOFError: a file is missing or damaged.
        """
        # Views, because indexing numpy's memmap class itself is several times slower.
        return cls({name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in columns}, folder)

    def save(self, folder: Path) -> None:
        """Write one file per column."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in self.arrays.items():
            np.save(folder / f"{name}.npy", values)


class TableBuilder:
    """Table that is filled image by image."""

    def __init__(self) -> None:
        self.file, self.offset, self.size, self.label = array("i"), array("q"), array("q"), array("q")
        self.text, self.ends = bytearray(), array("q")

    def add(self, file: int, offset: int, size: int, label: int, key: str) -> None:
        """Append one image."""
        self.file.append(file)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)
        self.text += key.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.label)

    def table(self) -> Table:
        """Return the table."""
        long = {"offset": self.offset, "size": self.size, "label": self.label, "key_ends": self.ends}
        arrays: dict[str, NDArray[Any]] = {name: np.frombuffer(values, np.int64) for name, values in long.items()}
        arrays |= {"file": np.frombuffer(self.file, np.int32), "key_text": np.frombuffer(bytes(self.text), np.uint8)}
        return Table(arrays)


def cached(cache: Path | None, files: Sequence[Path], about: dict[str, Any], build: Callable[[], Table]) -> Table:
    """Return the table that `build` makes from `files`, from the cache if no file has changed since.

    Args:
        cache: folder of cached tables; None builds the table every time.
        files: files that the table depends on.
        about: other values that it depends on.
        build: makes the table.
    """
    if cache is None:
        return build()
    states = [(str(path.absolute()), (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
    name = hashlib.sha256(json.dumps([states, about], sort_keys=True).encode()).hexdigest()[:32]
    folder = cache.expanduser() / f"table-{name}"
    try:
        return Table.open(folder)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        pass
    log.info("indexing %d archive%s; this is done once", len(files), "" if len(files) == 1 else "s")
    table = build()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        table.save(unfinished)
        if folder.exists():  # damaged, or another process was faster
            shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        return Table.open(folder)
    except OSError:  # without a cache, indexing is only slower
        shutil.rmtree(unfinished, ignore_errors=True)
        return table
