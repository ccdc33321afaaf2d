"""Read a pack: `data=packed data.root=...`.

Shapes: N images of H x W pixels.
"""

import json
import mmap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, overload

import numpy as np
from numpy.typing import NDArray

from vitrail.data.bit_depth import ValueRange
from vitrail.data.sources.contract import SplitName
from vitrail.data.sources.packed.files import file_hash
from vitrail.data.sources.packed.options import PackOptions
from vitrail.data.sources.packed.writer import FORMAT
from vitrail.data.sources.ranges import RangeSplit
from vitrail.data.sources.tables import Table
from vitrail.errors import ConfigError, ImageError
from vitrail.types import Sample
from vitrail_runtime.checking import Length, checked

_MAPPED = 64  # data files of pixels that are mapped at the same time in a process


class LabelSets(Sequence[tuple[int, ...]]):
    """Classes of each of N images, in two arrays.

    Args:
        labels: classes of all images, one after another.
        ends: (N,) end of each image's classes in `labels`.
    """

    def __init__(self, labels: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.labels, self.ends = labels, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"label set {index} of {len(self)}")
        first = int(self.ends[number - 1]) if number else 0
        return tuple(self.labels[first : int(self.ends[number])].tolist())


class PackedSplit(RangeSplit):
    """Split of a pack with encoded images."""

    def __init__(self, paths: Sequence[Path], table: Table, value_range: ValueRange | None) -> None:
        super().__init__(paths, table, value_range or "type")
        if "set_ends" in table.arrays:
            self.label_sets = LabelSets(table.arrays["set_labels"], table.arrays["set_ends"])


class RawSplit:
    """Split of a pack with pixels, which are mapped from the files and not decoded."""

    def __init__(self, paths: Sequence[Path], table: Table) -> None:
        self.table, self.paths = table, list(paths)
        self.label_sets: Sequence[tuple[int, ...]] | None = None
        if "set_ends" in table.arrays:
            self.label_sets = LabelSets(table.arrays["set_labels"], table.arrays["set_ends"])
        self._map = lru_cache(_MAPPED)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return RawSplit, (self.paths, self.table)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        return self.table.labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.pixels(index), int(self.table.labels[index]), self.table.keys[index])

    def keys(self) -> Sequence[str]:
        """Return the keys of all samples, in order; each is decoded when it is asked for."""
        return self.table.keys

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels (H, W, 3) of an image, a read-only view of the file.

        Raises:
            ImageError: the file cannot be read.
        """
        table = self.table
        mapped, (height, width) = self._map(int(table.file[index])), table.arrays["shape"][index].tolist()
        offset, size = int(table.offset[index]), int(table.size[index])
        # Request the whole range at once; page faults would read it in small pieces from a slow disk.
        start = offset - offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, offset + size - start)
        return np.frombuffer(mapped, np.uint8, size, offset).reshape(height, width, 3)

    def _open(self, number: int) -> mmap.mmap:
        try:
            with self.paths[number].open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ImageError(f"{self.paths[number]}: cannot be read ({error.strerror}).") from error


@checked
class Packed:
    """Source of a pack.

    Args:
        root: folder of the pack.
        value_range: black and white of images with more than 8 bits per channel; None for the pack's own, which is that
            of the data that was packed.

    Raises:
        ConfigError: there is no pack, it is unfinished, incomplete or of a newer format, or `value_range` contradicts
            the pixels that it stores.
    """

    def __init__(self, root: str | None, value_range: Annotated[Sequence[float], Length(2)] | None = None) -> None:
        if not root:
            raise ConfigError("data.root: not set. Set it to the folder of a pack: data.root=/path/to/it.")
        self.root = Path(root).expanduser().absolute()
        self.manifest = _manifest(self.root)
        begun = self.manifest["begun"]
        self.classes: list[str] = begun["classes"]
        self.options = PackOptions.read(begun["options"])
        self.splits: tuple[SplitName, ...] = tuple(self.manifest["splits"])
        packed = begun["value_range"] and (float(begun["value_range"][0]), float(begun["value_range"][1]))
        asked = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        fixed = self.options != PackOptions()
        if fixed and packed and asked and packed != asked:
            raise ConfigError(
                f"data.value_range={list(asked)}: the pack {self.root} was made with {list(packed)}; pack the data"
                " again with the other range."
            )
        self.value_range: ValueRange | None = packed if fixed else asked or packed
        for split in self.splits:
            self._check_files(split)

    def prepare(self) -> None:
        """Do nothing: src/pack.py has written the files."""

    def open(self, split: SplitName) -> PackedSplit | RawSplit:
        """Map a split's table; images are read later, on access.

        Raises:
            ConfigError: the pack has no such split, or its table is damaged.
        """
        if split not in self.splits:
            raise ConfigError(
                f"data.root={self.root}: the pack has no {split} split, only {' and '.join(self.splits)}; pack a data"
                f" set that has one{', or use src/eval.py' if split == 'train' else ''}."
            )
        about = self.manifest["splits"][split]
        try:
            table = Table.open(self.root / split, about["columns"])
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"data.root={self.root}: {split} is damaged ({error}); copy or pack it again.") from error
        if len(table) != about["images"]:
            raise ConfigError(
                f"data.root={self.root}: {split} has {len(table)} images instead of {about['images']}; copy or pack it"
                " again."
            )
        paths = [self.root / split / file["name"] for file in about["files"][: about["data_files"]]]
        if self.options.format == "raw":
            return RawSplit(paths, table)
        return PackedSplit(paths, table, self.value_range)

    def storage(self) -> str:
        """Return how images are stored, by the names of `benchmarks/data_path.py`."""
        if self.options.format == "raw":
            return "packed_raw_original" if self.options.size is None else "packed_raw"
        return "packed" if self.options.size is None else "packed_256"

    def describe(self) -> str:
        """Describe the stored pixels in one line; empty if they are those of the original files."""
        return self.options.describe()

    def damaged(self) -> Iterator[str]:
        """Yield a sentence for each file whose checksum is wrong; reads the whole pack."""
        for split in self.splits:
            for file in self.manifest["splits"][split]["files"]:
                path = self.root / split / file["name"]
                if file_hash(path) != file["sha256"]:
                    yield f"{path}: its checksum is wrong; copy or pack it again"

    def _check_files(self, split: SplitName) -> None:
        """Check that all files of a split are there, with their full size."""
        for file in self.manifest["splits"][split]["files"]:
            path = self.root / split / file["name"]
            try:
                found = path.stat().st_size
            except OSError:
                raise ConfigError(
                    f"data.root={self.root}: {split}/{file['name']} is missing; the pack was copied only in part. Copy"
                    " it again."
                ) from None
            if found != file["bytes"]:
                raise ConfigError(
                    f"data.root={self.root}: {split}/{file['name']} has {found} bytes instead of {file['bytes']}; it is"
                    f" {'cut short' if found < file['bytes'] else 'another file'}. Copy the pack again."
                )


def _manifest(root: Path) -> dict[str, Any]:
    """Read a pack's manifest.

    Raises:
        ConfigError: there is no finished pack of a known format.
    """
    path = root / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        newer = manifest["format"] > FORMAT
        manifest["begun"], manifest["splits"]
    except FileNotFoundError:
        if not root.is_dir():
            reason = "no such folder. Set data.root to the folder of a pack"
        elif (root / "begun.json").exists():
            reason = "an unfinished pack; run the same pack.py command again to resume"
        else:
            reason = "no pack (no manifest.json); write one with src/pack.py, or copy it completely"
        raise ConfigError(f"data.root={root}: {reason}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); copy or pack the data again.") from error
    if newer:
        raise ConfigError(
            f"data.root={root}: written by a newer vitrail (format {manifest['format']}); update vitrail."
        )
    return manifest
