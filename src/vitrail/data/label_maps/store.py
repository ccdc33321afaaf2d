"""Label maps of a whole data set in one file with random access.

A store is a folder:

    maps.bin       one record per image: scores float16 (K, H, W), then classes uint16 or int32 (K, H, W)
    keys.npy       keys of the images, in the order of the records
    hashes.npy     sorted hashes of the keys; order.npy has their records: a key is found by bisection
    manifest.json  description, and a checksum of each part of maps.bin; written last, so a store without it is
                   unfinished
    begun.json     description of an unfinished store
    done.npy       in an unfinished store: which records are written

A record is read with one system call into a new buffer, so the memory of a process does not grow with the number of
images or reads.

Shapes: B records, K scores per cell, H x W cells.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.data.writing import write_atomically
from vitrail.errors import ConfigError

FORMAT = 1
_PART = 64 * 2**20  # approximate bytes per checksum


class Layout:
    """Shape and data types of one record."""

    def __init__(self, top_k: int, grid: tuple[int, int], num_classes: int) -> None:
        self.shape = (top_k, *grid)
        self.num_classes = num_classes
        self.classes_type = np.dtype("<u2") if num_classes <= 65_535 else np.dtype("<i4")
        self.numbers = int(np.prod(self.shape))
        self.record = self.numbers * (2 + self.classes_type.itemsize)  # bytes

    def pack(self, scores: NDArray[Any], classes: NDArray[Any]) -> bytes:
        """Return the bytes of one or more records; scores and classes are (..., K, H, W).

        Raises:
            ValueError: the shape is wrong, scores are not finite in float16, or classes are out of range.
        """
        if scores.shape[-3:] != self.shape or classes.shape != scores.shape:
            raise ValueError(f"scores {scores.shape} and classes {classes.shape} must both end in {self.shape}.")
        with np.errstate(over="ignore"):  # reported below
            half = scores.astype("<f2").reshape(-1, self.numbers)
        if not np.isfinite(half).all():
            raise ValueError("scores must be finite and below 65,504, the largest float16.")
        if classes.size and (classes.min() < 0 or classes.max() >= self.num_classes):
            raise ValueError(f"classes {classes.min()} to {classes.max()} are not within 0 to {self.num_classes - 1}.")
        whole = classes.astype(self.classes_type).reshape(-1, self.numbers)
        return np.concatenate((half.view(np.uint8), whole.view(np.uint8)), axis=1).tobytes()

    def unpack(self, record: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[Any]]:
        """Return scores and classes (K, H, W) of one record, as views of it."""
        split = 2 * self.numbers
        return record[:split].view("<f2").reshape(self.shape), record[split:].view(self.classes_type).reshape(
            self.shape
        )


class LabelMapWriter:
    """Writer of a store, in any order and from several processes.

    Create it with `LabelMapStore.create`. After an interruption, creating the same store again resumes it: records that
    are completely written are kept.
    """

    def __init__(self, path: Path, layout: Layout, num_samples: int, about: dict[str, Any]) -> None:
        self.path, self.layout, self.num_samples, self.about = path, layout, num_samples, about
        self._file = os.open(path / "maps.bin", os.O_RDWR)
        self.done = np.load(path / "done.npy", mmap_mode="r+")
        """(num_samples,) uint8: 1 if the record is written; shared between processes."""

    @classmethod
    def join(cls, path: str | Path) -> "LabelMapWriter":
        """Open the unfinished store at `path` that another process created.

        Raises:
            ConfigError: there is no unfinished store.
        """
        path = Path(path)
        if not (path / "begun.json").is_file() or (path / "manifest.json").exists():
            raise ConfigError(f"{path}: contains no unfinished label maps. Check the path.")
        begun = json.loads((path / "begun.json").read_text())
        layout = Layout(begun["top_k"], tuple(begun["grid"]), begun["num_classes"])
        return cls(path, layout, begun["num_samples"], begun["about"])

    def write(self, start: int, scores: NDArray[Any], classes: NDArray[Any]) -> None:
        """Write record `start` from arrays (K, H, W), or B records from `start` on from arrays (B, K, H, W).

        Raises:
            ValueError: see `Layout.pack`.
        """
        data = self.layout.pack(np.asarray(scores), np.asarray(classes))
        count = len(data) // self.layout.record
        if not 0 <= start <= self.num_samples - count:
            raise ValueError(
                f"records {start} to {start + count - 1} do not fit a store of {self.num_samples} records."
            )
        view, offset = memoryview(data), start * self.layout.record
        while view:  # pwrite may write only a part, for example when the disk fills up
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
        self.done[start : start + count] = 1

    def finish(self) -> "LabelMapStore":
        """Check that all records are written, write the manifest, and open the store for reading.

        Raises:
            ConfigError: records are missing.
        """
        missing = int(self.num_samples - np.count_nonzero(self.done))
        if missing:
            raise ConfigError(
                f"{self.path}: {missing} of {self.num_samples} label maps are not written yet;"
                " run the same command again to resume."
            )
        os.fsync(self._file)
        per_part = max(1, _PART // self.layout.record)
        manifest = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "top_k": self.layout.shape[0],
            "grid": list(self.layout.shape[1:]),
            "num_classes": self.layout.num_classes,
            "records_per_part": per_part,
            "sha256": [_checksum(self._file, *part) for part in _parts(self.num_samples, self.layout.record, per_part)],
            "keys_sha256": hashlib.sha256((self.path / "keys.npy").read_bytes()).hexdigest(),
            "about": self.about,
        }
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1).encode())
        os.close(self._file)
        (self.path / "done.npy").unlink()
        return LabelMapStore.open(self.path)


class LabelMapStore:
    """Read-only store of label maps: `store[key]` or `store[index]` returns (scores, classes), both (K, H, W)."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.num_samples: int = manifest["num_samples"]
        self.layout = Layout(manifest["top_k"], tuple(manifest["grid"]), manifest["num_classes"])
        self.about: dict[str, Any] = manifest["about"]
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path / "maps.bin", os.O_RDONLY)
        self.keys, self._hashes, self._order = (
            np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("keys", "hashes", "order")
        )

    # Pickled stores reopen the files, because file descriptors are not valid in another process.
    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    @property
    def top_k(self) -> int:
        """Scores per cell, K."""
        return self.layout.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells (H, W)."""
        return self.layout.shape[1], self.layout.shape[2]

    @property
    def num_classes(self) -> int:
        """Number of classes of the annotator."""
        return self.layout.num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __getitem__(self, key: str | int) -> tuple[NDArray[np.float16], NDArray[Any]]:
        index = self.index(key) if isinstance(key, str) else int(key)
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"{self.path}: no label map {index}; there are {self.num_samples}.")
        record = np.empty(self.layout.record, np.uint8)
        if os.preadv(self._file, [record.data], index % self.num_samples * self.layout.record) != self.layout.record:
            raise ConfigError(
                f"data.label_maps={self.path}: maps.bin is shorter than its manifest states; copy the maps again."
            )
        return self.layout.unpack(record)

    def index(self, key: str) -> int:
        """Return the record of the image `key`.

        Raises:
            KeyError: the store has no such image.
        """
        found = self._find(key)
        if found is None:
            raise KeyError(f"{key}: no label map in {self.path}.")
        return found

    def key(self, index: int) -> str:
        """Return the key of a record."""
        return bytes(self.keys[index]).decode()

    def indices(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the records (N,) of N images, -1 for images without a label map."""
        names = np.array([key.encode() for key in keys], dtype=np.bytes_)
        if len(names) == self.num_samples and np.array_equal(names, self.keys):
            return np.arange(self.num_samples)
        hashes = np.fromiter((_hash(key) for key in keys), np.uint64, len(keys))
        places = np.searchsorted(self._hashes, hashes).clip(max=self.num_samples - 1)
        found = self._order[places].astype(np.int64)
        for index in map(int, np.flatnonzero(self.keys[found] != names)):  # missing, or a hash collision
            record = self._find(keys[index])
            found[index] = -1 if record is None else record
        return found

    def _find(self, key: str) -> int | None:
        name, wanted = key.encode(), _hash(key)
        place = int(self._hashes.searchsorted(np.uint64(wanted)))  # the method takes half the time of np.searchsorted
        while place < self.num_samples and int(self._hashes[place]) == wanted:
            index = int(self._order[place])
            if bytes(self.keys[index]) == name:
                return index
            place += 1  # hash collision
        return None

    @classmethod
    def create(
        cls,
        path: str | Path,
        num_samples: int,
        top_k: int,
        grid: tuple[int, int],
        num_classes: int,
        keys: Sequence[str] | None = None,
        **about: Any,
    ) -> LabelMapWriter:
        """Create a store, or resume an unfinished one with the same description.

        Args:
            path: folder of the store.
            num_samples: number of images.
            top_k: scores per cell.
            grid: rows and columns of cells.
            num_classes: number of classes of the annotator.
            keys: keys of the images, in the order of the records; None numbers them "0", "1", ...
            about: further entries of the manifest: annotator, hash of its weights, class names, transform, ...

        Raises:
            ConfigError: the folder contains a finished store or one with another description, or a key occurs twice.
        """
        path, layout = Path(path), Layout(top_k, (int(grid[0]), int(grid[1])), num_classes)
        names = [str(index) for index in range(num_samples)] if keys is None else list(keys)
        if len(names) != num_samples:
            raise ConfigError(f"{path}: {len(names)} keys for {num_samples} label maps; give one key per map.")
        if (path / "manifest.json").exists():
            raise ConfigError(f"{path}: already contains finished label maps; choose another folder, or remove it.")
        description = {"num_samples": num_samples, "top_k": top_k, "grid": list(layout.shape[1:])}
        description |= {
            "num_classes": num_classes,
            "keys_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        }
        description |= {"about": about}
        begun = path / "begun.json"
        if begun.exists():
            if json.loads(begun.read_text()) != json.loads(json.dumps(description)):
                raise ConfigError(
                    f"{path}: contains unfinished label maps with another description; choose another folder."
                )
            return LabelMapWriter(path, layout, num_samples, about)
        path.mkdir(parents=True, exist_ok=True)
        _save_keys(path, names)
        np.save(path / "done.npy", np.zeros(num_samples, np.uint8))
        with (path / "maps.bin").open("wb") as file:
            file.truncate(num_samples * layout.record)
        write_atomically(begun, json.dumps(description, indent=1).encode())
        return LabelMapWriter(path, layout, num_samples, about)

    @classmethod
    def open(cls, path: str | Path) -> "LabelMapStore":
        """Open a finished store; records are read later, on access.

        Raises:
            ConfigError: there is no store, or it is unfinished, truncated or of a newer format.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            state = (
                "unfinished label maps; run the same command again to resume" if (path / "begun.json").exists() else ""
            )
            raise ConfigError(f"data.label_maps={path}: {state or 'no label maps (no manifest.json); check the path'}.")
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if manifest["format"] > FORMAT:
                raise ConfigError(
                    f"data.label_maps={path}: written by a newer vitrail (format {manifest['format']}); update vitrail."
                )
            store = cls(path, manifest)
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"data.label_maps={path}: damaged ({error}); copy or annotate again.") from error
        expected, found = store.num_samples * store.layout.record, os.fstat(store._file).st_size
        if found != expected:
            raise ConfigError(
                f"data.label_maps={path}: maps.bin has {found} bytes instead of {expected}; it is truncated."
                " Copy the maps again."
            )
        return store

    @classmethod
    def import_official(
        cls, source: str | Path, path: str | Path, num_classes: int = 1000, **about: Any
    ) -> "LabelMapStore":
        """Convert published label maps; see `vitrail.data.label_maps.official.import_official`."""
        from vitrail.data.label_maps.official import import_official

        return import_official(source, path, num_classes, **about)

    def export_official(self, folder: str | Path) -> None:
        """Write the published format; see `vitrail.data.label_maps.official.export_official`."""
        from vitrail.data.label_maps.official import export_official

        export_official(self, folder)

    def damaged_parts(self) -> Iterator[tuple[int, int]]:
        """Yield first and last record of every part whose checksum differs from the manifest; reads the whole store."""
        per_part = self.manifest["records_per_part"]
        parts = _parts(self.num_samples, self.layout.record, per_part)
        for number, ((offset, size), expected) in enumerate(zip(parts, self.manifest["sha256"], strict=True)):
            if _checksum(self._file, offset, size) != expected:
                yield number * per_part, number * per_part + size // self.layout.record - 1


def _parts(num_samples: int, record: int, per_part: int) -> list[tuple[int, int]]:
    """Return (offset, size) in bytes of each part of maps.bin."""
    return [(start * record, min(per_part, num_samples - start) * record) for start in range(0, num_samples, per_part)]


def _checksum(file: int, offset: int, size: int) -> str:
    digest, step = hashlib.sha256(), 4 * 2**20
    for at in range(offset, offset + size, step):
        digest.update(os.pread(file, min(step, offset + size - at), at))
    return digest.hexdigest()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _save_keys(path: Path, names: Sequence[str]) -> None:
    keys = np.array([name.encode() for name in names], dtype=np.bytes_)
    hashes = np.fromiter((_hash(name) for name in names), np.uint64, len(names))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        if names[order[place]] == names[order[place + 1]]:
            raise ConfigError(f"{path}: the key {names[order[place]]} occurs twice.")
    for name, array in (("keys", keys), ("hashes", hashes), ("order", order.astype(np.int64))):
        np.save(path / f"{name}.npy", array)
