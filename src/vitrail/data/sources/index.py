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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.data.sources.images import IMAGE_EXTENSIONS

_VERSION = 1
_KEEP_SECONDS = 3600  # arrays younger than this are not deleted: another process may be about to open them
_SETTLED_SECONDS = 2.0  # timestamps are coarse: a folder changed this shortly before the listing is not trusted


class FileIndex:
    """Paths of the image files below `root`, class by class, sorted by name.

    Args:
        root: folder that contains the class folders.
        classes: names of the class folders, in the order of the class indices.
        cache: folder of cached lists; None lists the files every time.
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
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def path(self, index: int) -> str:
        """Return the path of a file, relative to the root."""
        first = int(self.ends[index - 1]) if index else 0
        name = bytes(self.names[first : int(self.ends[index])]).decode("utf-8", "surrogateescape")
        return f"{self.classes[self.label(index)]}/{name}"

    def paths(self) -> list[str]:
        """Return the paths of all files, relative to the root."""
        return [self.path(index) for index in range(len(self))]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class of each file."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def _list_files(self) -> None:
        self._start_time = time.time()
        self._folders: dict[str, int] = {}  # folder -> time of its last change
        names, ends, counts, end = bytearray(), [], [], 0
        for name in self.classes:
            found = self._images(name)
            for file in found:
                encoded = os.fsencode(file)
                names += encoded
                end += len(encoded)
                ends.append(end)
            counts.append(len(found))
        self.names: NDArray[np.uint8] = np.frombuffer(bytes(names), np.uint8)
        self.ends: NDArray[np.int64] = np.array(ends, np.int64)
        self.counts: NDArray[np.int64] = np.array(counts, np.int64)

    def _images(self, name: str) -> list[str]:
        """Return the image files below a class folder, at any depth, relative to it."""
        found: list[str] = []
        top = self.root / name
        for parent, _, files in os.walk(top, followlinks=True):  # several times faster than pathlib on ImageNet
            inside = os.path.relpath(parent, top)
            prefix = "" if inside == "." else f"{inside}/"
            self._folders[name if inside == "." else f"{name}/{inside}"] = os.stat(parent).st_mtime_ns  # noqa: PTH116
            found += [prefix + file for file in files if is_image(file)]
        return sorted(found)

    # The cached list: three arrays, and a manifest that describes them.

    def _folder(self, cache: Path) -> Path:
        return cache / hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:16]

    def _open(self, folder: Path) -> bool:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if any(manifest[key] != value for key, value in self._about().items()) or not self._is_current(manifest):
                return False
            names = (folder / manifest["arrays"] / f"{name}.npy" for name in ("names", "ends", "counts"))
            self.names, self.ends, self.counts = (np.load(file, mmap_mode="r") for file in names)
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
        return {"version": _VERSION, "root": str(self.root.absolute()), "classes": self.classes}

    def _is_current(self, manifest: dict[str, Any]) -> bool:
        latest = (manifest["began"] - _SETTLED_SECONDS) * 1e9
        for name, changed in manifest["folders"].items():
            if os.stat(self.root / name).st_mtime_ns != changed or changed > latest:  # noqa: PTH116
                return False
        return True

    def _keep(self, folder: Path) -> None:
        """Write the arrays to a new folder, because others may be reading the old one, then update the manifest."""
        arrays = f"arrays-{secrets.token_hex(4)}"
        try:
            (folder / arrays).mkdir(parents=True)
            for name in ("names", "ends", "counts"):
                np.save(folder / arrays / f"{name}.npy", getattr(self, name))
                setattr(
                    self, name, np.load(folder / arrays / f"{name}.npy", mmap_mode="r")
                )  # frees the memory of the list
            manifest = {**self._about(), "began": self._start_time, "folders": self._folders, "arrays": arrays}
            unfinished = folder / f".manifest.{os.getpid()}"
            unfinished.write_text(json.dumps(manifest), encoding="utf-8")
            unfinished.replace(folder / "manifest.json")
        except OSError:  # without a cache, listing is only slower
            shutil.rmtree(folder / arrays, ignore_errors=True)
            return
        for old in folder.glob("arrays-*"):
            if old.name != arrays and old.stat().st_mtime < time.time() - _KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


def is_image(name: str) -> bool:
    """Return whether a file name is that of a visible image file."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
