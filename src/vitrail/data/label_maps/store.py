"""Label maps of a whole data set in one file that any process can read at any place.

A store is a folder:

    maps.bin       one record an image: scores float16 (K, H, W), then classes uint16 or int32 (K, H, W)
    keys.npy       the images' keys, in the order of the records
    hashes.npy     their hashes, sorted, and order.npy, the records they belong to: a key is found by bisection
    manifest.json  what the numbers mean, and a checksum of each part of maps.bin; written last, so that a store without
                   it is unfinished
    done.npy       while it is being written: which records are

Records are read with one system call into memory of the reader's own; what a process holds does not grow with the
number of images or of reads.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import ConfigError

FORMAT = 1
_PART = 64 * 2**20  # bytes that share a checksum, about


class Layout:
    """Shape of one record."""

    def __init__(self, top_k: int, grid: tuple[int, int], num_classes: int) -> None:
        self.shape = (top_k, *grid)
        self.num_classes = num_classes
        self.classes_type = np.dtype("<u2") if num_classes <= 65_535 else np.dtype("<i4")
        self.numbers = int(np.prod(self.shape))
        self.record = self.numbers * (2 + self.classes_type.itemsize)  # bytes

    def pack(self, scores: NDArray[Any], classes: NDArray[Any]) -> bytes:
        """Records of one or several images, (..., K, H, W) each.

        Raises:
            ValueError: another shape, scores that are not finite in float16, or classes out of range.
        """
        if scores.shape[-3:] != self.shape or classes.shape != scores.shape:
            raise ValueError(f"scores {scores.shape} and classes {classes.shape} must both end in {self.shape}.")
        with np.errstate(over="ignore"):  # told below
            half = scores.astype("<f2").reshape(-1, self.numbers)
        if not np.isfinite(half).all():
            raise ValueError("scores must be finite and below 65,504, the largest float16.")
        if classes.size and (classes.min() < 0 or classes.max() >= self.num_classes):
            raise ValueError(f"classes {classes.min()} to {classes.max()} are not within 0 to {self.num_classes - 1}.")
        whole = classes.astype(self.classes_type).reshape(-1, self.numbers)
        return np.concatenate((half.view(np.uint8), whole.view(np.uint8)), axis=1).tobytes()

    def unpack(self, record: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[Any]]:
        """Scores and classes of one record, as views of it."""
        split = 2 * self.numbers
        return record[:split].view("<f2").reshape(self.shape), record[split:].view(self.classes_type).reshape(
            self.shape
        )


class LabelMapWriter:
    """Fills a store, in any order and from several processes; what is there already is kept.

    Made by `LabelMapStore.create`. Interrupted, it goes on where it was when the same store is created again: a record
    counts only once it is written whole.
    """

    def __init__(self, path: Path, layout: Layout, num_samples: int, about: dict[str, Any]) -> None:
        self.path, self.layout, self.num_samples, self.about = path, layout, num_samples, about
        self._file = os.open(path / "maps.bin", os.O_RDWR)
        self.done = np.load(path / "done.npy", mmap_mode="r+")
        """(num_samples,) uint8, 1 where the record is written; shared between processes."""

    @classmethod
    def join(cls, path: str | Path) -> "LabelMapWriter":
        """Help another process to fill the unfinished store at `path`.

        Raises:
            ConfigError: there is none.
        """
        path = Path(path)
        if not (path / "begun.json").is_file() or (path / "manifest.json").exists():
            raise ConfigError(f"{path}: holds no unfinished label maps.")
        begun = json.loads((path / "begun.json").read_text())
        layout = Layout(begun["top_k"], tuple(begun["grid"]), begun["num_classes"])
        return cls(path, layout, begun["num_samples"], begun["about"])

    def write(self, start: int, scores: NDArray[Any], classes: NDArray[Any]) -> None:
        """Write the record `start`, or with arrays (B, K, H, W) the B records from there on.

        Raises:
            ValueError: see `Layout.pack`.
        """
        data = self.layout.pack(np.asarray(scores), np.asarray(classes))
        count = len(data) // self.layout.record
        if not 0 <= start <= self.num_samples - count:
            raise ValueError(f"records {start} to {start + count - 1} of a store of {self.num_samples}.")
        view, offset = memoryview(data), start * self.layout.record
        while view:  # a disk that fills up may take a part
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
        self.done[start : start + count] = 1

    def finish(self) -> "LabelMapStore":
        """Check that all records are there, write the checksums, and open the store for reading.

        Raises:
            ConfigError: records are missing.
        """
        missing = int(self.num_samples - np.count_nonzero(self.done))
        if missing:
            raise ConfigError(f"{self.path}: {missing} of {self.num_samples} label maps are not written yet.")
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
        _write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1).encode())
        os.close(self._file)
        (self.path / "done.npy").unlink()
        return LabelMapStore.open(self.path)


class LabelMapStore:
    """Read-only label maps: `store[key]` or `store[index]` gives (scores, classes), both (K, H, W)."""

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

    # A reader in another process opens the files itself.
    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    @property
    def top_k(self) -> int:
        """Scores a cell, K."""
        return self.layout.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells (H, W)."""
        return self.layout.shape[1], self.layout.shape[2]

    @property
    def num_classes(self) -> int:
        """Classes that the annotator knows."""
        return self.layout.num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __getitem__(self, key: str | int) -> tuple[NDArray[np.float16], NDArray[Any]]:
        index = self.index(key) if isinstance(key, str) else int(key)
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"label map {index} of {self.num_samples} in {self.path}.")
        record = np.empty(self.layout.record, np.uint8)
        if os.preadv(self._file, [record.data], index % self.num_samples * self.layout.record) != self.layout.record:
            raise ConfigError(f"data.label_maps={self.path}: maps.bin is shorter than its manifest says.")
        return self.layout.unpack(record)

    def index(self, key: str) -> int:
        """The record of the image `key`.

        Raises:
            KeyError: there is none.
        """
        found = self._find(key)
        if found is None:
            raise KeyError(f"{key}: no label map in {self.path}.")
        return found

    def key(self, index: int) -> str:
        """The key of a record."""
        return bytes(self.keys[index]).decode()

    def indices(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The records of many images at once, -1 where there is none."""
        names = np.array([key.encode() for key in keys], dtype=np.bytes_)
        if len(names) == self.num_samples and np.array_equal(names, self.keys):
            return np.arange(self.num_samples)
        hashes = np.fromiter((_hash(key) for key in keys), np.uint64, len(keys))
        places = np.searchsorted(self._hashes, hashes).clip(max=self.num_samples - 1)
        found = self._order[places].astype(np.int64)
        for index in map(int, np.flatnonzero(self.keys[found] != names)):  # missing, or another key of the same hash
            record = self._find(keys[index])
            found[index] = -1 if record is None else record
        return found

    def _find(self, key: str) -> int | None:
        name, wanted = key.encode(), _hash(key)
        place = int(self._hashes.searchsorted(np.uint64(wanted)))  # half the time of NumPy's function around it
        while place < self.num_samples and int(self._hashes[place]) == wanted:
            index = int(self._order[place])
            if bytes(self.keys[index]) == name:
                return index
            place += 1  # another key of the same hash
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
        """Begin a store, or go on with an unfinished one of the same description.

        Args:
            path: folder to make.
            num_samples: images.
            top_k: scores a cell.
            grid: rows and columns of cells.
            num_classes: classes that the annotator knows.
            keys: of the images, in the order of the records; None numbers them "0", "1", ...
            about: what else the manifest shall say: annotator, hash of its weights, class names, transform, ...

        Raises:
            ConfigError: a finished store is there, or one of another description; keys that occur twice.
        """
        path, layout = Path(path), Layout(top_k, (int(grid[0]), int(grid[1])), num_classes)
        names = [str(index) for index in range(num_samples)] if keys is None else list(keys)
        if len(names) != num_samples:
            raise ConfigError(f"{path}: {len(names)} keys for {num_samples} label maps.")
        if (path / "manifest.json").exists():
            raise ConfigError(f"{path}: holds finished label maps already; name another folder, or remove it.")
        description = {"num_samples": num_samples, "top_k": top_k, "grid": list(layout.shape[1:])}
        description |= {
            "num_classes": num_classes,
            "keys_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        }
        description |= {"about": about}
        begun = path / "begun.json"
        if begun.exists():
            if json.loads(begun.read_text()) != json.loads(json.dumps(description)):
                raise ConfigError(f"{path}: holds unfinished label maps of another kind; name another folder.")
            return LabelMapWriter(path, layout, num_samples, about)
        path.mkdir(parents=True, exist_ok=True)
        _save_keys(path, names)
        np.save(path / "done.npy", np.zeros(num_samples, np.uint8))
        with (path / "maps.bin").open("wb") as file:
            file.truncate(num_samples * layout.record)
        _write_atomically(begun, json.dumps(description, indent=1).encode())
        return LabelMapWriter(path, layout, num_samples, about)

    @classmethod
    def open(cls, path: str | Path) -> "LabelMapStore":
        """Open a finished store; nothing is read yet, whatever its size.

        Raises:
            ConfigError: there is none, it is unfinished, cut short, or of a newer format.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            state = (
                "unfinished label maps; run the same command again to go on" if (path / "begun.json").exists() else ""
            )
            raise ConfigError(f"data.label_maps={path}: {state or 'no label maps (no manifest.json)'}.")
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if manifest["format"] > FORMAT:
                raise ConfigError(f"data.label_maps={path}: written by a newer vitrail (format {manifest['format']}).")
            store = cls(path, manifest)
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"data.label_maps={path}: damaged ({error}).") from error
        expected, found = store.num_samples * store.layout.record, os.fstat(store._file).st_size
        if found != expected:
            raise ConfigError(
                f"data.label_maps={path}: maps.bin has {found} bytes instead of {expected}; it was cut short."
            )
        return store

    @classmethod
    def import_official(
        cls, source: str | Path, path: str | Path, num_classes: int = 1000, **about: Any
    ) -> "LabelMapStore":
        """See `vitrail.data.label_maps.official.import_official`."""
        from vitrail.data.label_maps.official import import_official

        return import_official(source, path, num_classes, **about)

    def export_official(self, folder: str | Path) -> None:
        """See `vitrail.data.label_maps.official.export_official`."""
        from vitrail.data.label_maps.official import export_official

        export_official(self, folder)

    def damaged_parts(self) -> Iterator[tuple[int, int]]:
        """First and last record of every part whose checksum is not that of the manifest; reads the whole store."""
        per_part = self.manifest["records_per_part"]
        parts = _parts(self.num_samples, self.layout.record, per_part)
        for number, ((offset, size), expected) in enumerate(zip(parts, self.manifest["sha256"], strict=True)):
            if _checksum(self._file, offset, size) != expected:
                yield number * per_part, number * per_part + size // self.layout.record - 1


def _parts(num_samples: int, record: int, per_part: int) -> list[tuple[int, int]]:
    """(offset, size) in bytes of each part of maps.bin."""
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


def _write_atomically(path: Path, data: bytes) -> None:
    """Whole or not at all: a new file beside the target, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
