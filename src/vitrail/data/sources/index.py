"""Cached list of the image files in a folder of class folders.

Listing 14 million files takes minutes. A cached list opens in a moment, and all processes and loader workers share it
in memory, because they map the same file. The list is rebuilt when a folder of the tree has changed.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.data.images import image_extensions
from vitrail.data.sources.files import FolderWalk, reason_to_ignore, signature
from vitrail_runtime.names import readable

_VERSION = 2
_ARRAYS = ("names", "ends", "counts", "same_stem")
_KEEP_SECONDS = 3600  # arrays younger than this are not deleted: another process may be about to open them
_SETTLED_SECONDS = 2.0  # timestamps are coarse: a folder changed this shortly before the listing is not trusted


class FileIndex:
    """Paths of the image files below `root`, class by class, sorted by name.

    Image files are those of `FolderWalk`.

    Args:
        root: folder that contains the class folders.
        classes: names of the class folders, in the order of the class indices.
        cache: folder of cached lists; None lists the files every time.

    Attributes:
        ignored: number of files and folders that are not in the list, by extension or other reason.
        same_stem: sorted indices of the files whose name without extension occurs twice in their folder.
    """

    def __init__(self, root: Path, classes: Sequence[str], cache: Path | None = None) -> None:
        self.root, self.classes = root, list(classes)
        folder = None if cache is None else self._folder(cache)
        if folder is None or not self._open(folder):
            self._list_files()
            if folder is not None:
                self._keep(folder)
        self.starts = np.concatenate(([0], np.cumsum(self.counts)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def label(self, index: int) -> int:
        """Return the class of a file."""
        return int(self.starts.searchsorted(index, side="right")) - 1

    def path(self, index: int) -> str:
        """Return the path of a file, relative to the root."""
        return self._path(index, self.label(index))

    def key(self, index: int) -> str:
        """Return the key of a file: its path without extension, unless another file has the same path without it."""
        return self._key(index, self.path(index))

    def entry(self, index: int) -> tuple[str, int, str]:
        """Return path, class and key of a file, which is faster than one by one."""
        label = self.label(index)
        path = self._path(index, label)
        return path, label, self._key(index, path)

    def _path(self, index: int, label: int) -> str:
        first = int(self.ends[index - 1]) if index else 0
        name = bytes(self.names[first : int(self.ends[index])]).decode("utf-8", "surrogateescape")
        return f"{self.classes[label]}/{name}"

    def _key(self, index: int, path: str) -> str:
        place = int(self.same_stem.searchsorted(index))
        is_ambiguous = place < len(self.same_stem) and self.same_stem[place] == index
        return readable(path if is_ambiguous else path.rpartition(".")[0])

    def keys(self) -> list[str]:
        """Return the keys of all files, in order."""
        return [self.key(index) for index in range(len(self))]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class of each file."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def _list_files(self) -> None:
        self._start_time = time.time()
        walk = FolderWalk(self.root, self.classes)
        self._folders, self.ignored = walk.signatures, walk.ignored
        self._count_other_entries()
        names, end = bytearray(), 0
        ends: list[int] = []
        counts: list[int] = []
        same_stem: list[int] = []
        for name in self.classes:
            found = sorted(walk.files[name])
            stems = Counter(file.rpartition(".")[0] for file in found)
            if len(stems) < len(found):
                same_stem += [
                    len(ends) + number for number, file in enumerate(found) if stems[file.rpartition(".")[0]] > 1
                ]
            for file in found:
                encoded = os.fsencode(file)
                names += encoded
                end += len(encoded)
                ends.append(end)
            counts.append(len(found))
        self.names: NDArray[np.uint8] = np.frombuffer(bytes(names), np.uint8)
        self.ends: NDArray[np.int64] = np.array(ends, np.int64)
        self.counts: NDArray[np.int64] = np.array(counts, np.int64)
        self.same_stem: NDArray[np.int64] = np.array(same_stem, np.int64)

    def _count_other_entries(self) -> None:
        """Count the files and folders of the root that are not class folders."""
        classes = set(self.classes)
        self._folders["."] = signature(os.stat(self.root))  # noqa: PTH116
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name not in classes:
                    other = "folder that is no class" if entry.is_dir() else "image outside of the class folders"
                    self.ignored[reason_to_ignore(entry) or other] += 1

    # The cached list: arrays, and a manifest that describes them.

    def _folder(self, cache: Path) -> Path:
        return cache / hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:16]

    def _open(self, folder: Path) -> bool:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if any(manifest[key] != value for key, value in self._about().items()) or not self._is_current(manifest):
                return False
            for name in _ARRAYS:
                setattr(self, name, np.load(folder / manifest["arrays"] / f"{name}.npy", mmap_mode="r"))
            self.ignored = Counter(manifest["ignored"])
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
        ):  # missing, incomplete, or written by another version
            return False
        return True

    def _about(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "root": str(self.root.absolute()),
            "classes": self.classes,
            "extensions": list(image_extensions()),
        }

    def _is_current(self, manifest: dict[str, Any]) -> bool:
        latest = (manifest["began"] - _SETTLED_SECONDS) * 1e9
        return all(
            signature((self.root / name).stat()) == recorded and recorded[0] <= latest
            for name, recorded in manifest["folders"].items()
        )

    def _keep(self, folder: Path) -> None:
        """Write the arrays to a new folder, because others may be reading the old one, then update the manifest."""
        arrays = f"arrays-{secrets.token_hex(4)}"
        try:
            (folder / arrays).mkdir(parents=True)
            for name in _ARRAYS:
                np.save(folder / arrays / f"{name}.npy", getattr(self, name))
                setattr(
                    self, name, np.load(folder / arrays / f"{name}.npy", mmap_mode="r")
                )  # frees the memory of the list
            manifest = {**self._about(), "began": self._start_time, "folders": self._folders, "arrays": arrays}
            manifest["ignored"] = dict(self.ignored)
            unfinished = folder / f".manifest.{os.getpid()}"
            unfinished.write_text(json.dumps(manifest), encoding="utf-8")
            unfinished.replace(folder / "manifest.json")
        except OSError:  # without a cache, listing is only slower
            shutil.rmtree(folder / arrays, ignore_errors=True)
            return
        for old in folder.glob("arrays-*"):
            if old.name != arrays and old.stat().st_mtime < time.time() - _KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
