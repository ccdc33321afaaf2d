"""Which image files a folder of class folders holds, found once and then read from a file.

A listing of 14 million files takes minutes; kept, it is opened in a moment and lies in memory once for all processes,
loaders included, because they map the same file. It is made anew when a folder of the tree has changed.
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
_SPARED_SECONDS = 3600
_SETTLED_SECONDS = 2.0  # a folder that changed less than this before it was listed may have changed after, unseen


class FileIndex:
    """Paths of the image files below `root`, class by class, in the order of their names.

    Args:
        root: folder that holds the class folders.
        classes: their names, in the order of the class indices.
        cache: folder that keeps the listings; None lists the files every time.
    """

    def __init__(self, root: Path, classes: Sequence[str], cache: Path | None = None) -> None:
        self.root, self.classes = root, list(classes)
        folder = None if cache is None else self._folder(cache)
        if folder is None or not self._open(folder):
            self._list()
            if folder is not None:
                self._keep(folder)
        self.starts = np.concatenate(([0], np.cumsum(self.counts)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def label(self, index: int) -> int:
        """Class of a file."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def path(self, index: int) -> str:
        """Path of a file, relative to the root."""
        first = int(self.ends[index - 1]) if index else 0
        name = bytes(self.names[first : int(self.ends[index])]).decode("utf-8", "surrogateescape")
        return f"{self.classes[self.label(index)]}/{name}"

    def paths(self) -> list[str]:
        """All of them."""
        return [self.path(index) for index in range(len(self))]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class of each file."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def _list(self) -> None:
        self._began = time.time()
        self._folders: dict[str, int] = {}  # with the time of their last change
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
        """Names of the image files below a class folder, at any depth, relative to it."""
        found: list[str] = []
        top = self.root / name
        for parent, _, files in os.walk(top, followlinks=True):  # several times faster than pathlib on ImageNet
            inside = os.path.relpath(parent, top)
            prefix = "" if inside == "." else f"{inside}/"
            self._folders[name if inside == "." else f"{name}/{inside}"] = os.stat(parent).st_mtime_ns  # noqa: PTH116
            found += [prefix + file for file in files if is_image(file)]
        return sorted(found)

    # The kept listing: three arrays, and a manifest that says what they are of.

    def _folder(self, cache: Path) -> Path:
        return cache / hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:16]

    def _open(self, folder: Path) -> bool:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if any(manifest[key] != value for key, value in self._about().items()) or not self._is_current(manifest):
                return False
            names = (folder / manifest["arrays"] / f"{name}.npy" for name in ("names", "ends", "counts"))
            self.names, self.ends, self.counts = (np.load(file, mmap_mode="r") for file in names)
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # none, half of one, another version's
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
        """Write the arrays beside those of an earlier listing, which others may be reading, and then name them."""
        arrays = f"arrays-{secrets.token_hex(4)}"
        try:
            (folder / arrays).mkdir(parents=True)
            for name in ("names", "ends", "counts"):
                np.save(folder / arrays / f"{name}.npy", getattr(self, name))
                setattr(self, name, np.load(folder / arrays / f"{name}.npy", mmap_mode="r"))  # frees the listing's
            manifest = {**self._about(), "began": self._began, "folders": self._folders, "arrays": arrays}
            unfinished = folder / f".manifest.{os.getpid()}"
            unfinished.write_text(json.dumps(manifest), encoding="utf-8")
            unfinished.replace(folder / "manifest.json")
        except OSError:  # a cache that cannot be written to costs time, nothing else
            shutil.rmtree(folder / arrays, ignore_errors=True)
            return
        for old in folder.glob("arrays-*"):  # but what another process may just have written, or be about to open
            if old.name != arrays and old.stat().st_mtime < time.time() - _SPARED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


def is_image(name: str) -> bool:
    """Whether a file of this name is an image to be read."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
