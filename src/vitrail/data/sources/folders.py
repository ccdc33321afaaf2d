"""Folders of class folders."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrail.data.sources.contract import SplitName
from vitrail.data.sources.images import load_image
from vitrail.data.sources.index import FileIndex, is_image
from vitrail.errors import ConfigError
from vitrail.types import Sample


class FolderSplit:
    """Image files below one folder of class folders, sorted.

    Args:
        root: the split's folder.
        classes: names of its class folders.
        cache: see `FileIndex`.
    """

    def __init__(self, root: Path, classes: list[str], cache: Path | None = None) -> None:
        self.root, self.files = root, FileIndex(root, classes, cache)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        return self.files.labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files.path(index)
        return Sample(load_image(self.root / path), self.files.label(index), path.rpartition(".")[0])

    def keys(self) -> list[str]:
        """The keys of all samples, in order: paths without their extension."""
        return [path.rpartition(".")[0] for path in self.files.paths()]


def class_folders(folder: Path) -> Iterator[str]:
    """Names of the folders in `folder`, but for hidden ones."""
    return (entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class ImageFolder:
    """Any `train/` and `val/` tree of class folders.

    Args:
        root: folder that holds `train_dir` and `val_dir`.
        train_dir: name of the training folder; None where there is only something to evaluate on.
        val_dir: name of the validation folder.
        index: folder that keeps the lists of files from one start to the next; None lists them every time.

    Raises:
        ConfigError: a folder is missing or empty, or both do not hold the same classes: the mistake that gives 0 %
            accuracy while the loss falls.
    """

    def __init__(
        self,
        root: str | None,
        train_dir: str | None = "train",
        val_dir: str = "val",
        index: str | Path | None = None,
    ) -> None:
        if not root:
            raise ConfigError("data.root: not set; give the folder that holds train/ and val/, data.root=/path/to/it.")
        self.root, self.index = Path(root).expanduser().absolute(), Path(index).expanduser() if index else None
        self.folders = {"val": self.root / val_dir} | ({"train": self.root / train_dir} if train_dir else {})
        if not self.root.is_dir():
            raise ConfigError(f"data.root={self.root}: no such folder.")
        self.classes = self._find_classes("train" if train_dir else "val")
        self._check_same_classes(self._find_classes("val"))

    def prepare(self) -> None:
        """List the files, where the lists are kept for the other processes."""
        if self.index:
            for folder in self.folders.values():
                FileIndex(folder, self.classes, self.index)

    def open(self, split: SplitName) -> FolderSplit:
        """List the files of a split.

        Raises:
            ConfigError: a class folder of it holds no image, or there is no such split.
        """
        if split not in self.folders:
            raise ConfigError("data.train_dir: not set, so that there is nothing to train on.")
        folder = FolderSplit(self.folders[split], self.classes, self.index)
        if not folder.files.counts.all():
            empty = self.classes[int(np.argmin(folder.files.counts))]
            raise ConfigError(f"data.root: class folder {self.folders[split] / empty} holds no image.")
        return folder

    def _find_classes(self, split: SplitName) -> list[str]:
        folder = self.folders[split]
        if not folder.is_dir():
            raise ConfigError(f"data.root={self.root}: holds no folder {folder.name}/ of class folders.")
        classes = sorted(class_folders(folder))
        if not classes:
            flat = any(is_image(path.name) for path in folder.iterdir())
            what = "images but no class folders; sort them into one folder a class" if flat else "no class folders"
            raise ConfigError(f"data.root: {folder} holds {what}.")
        return classes

    def _check_same_classes(self, val_classes: list[str]) -> None:
        train, val = set(self.classes), set(val_classes)
        if train == val:
            return
        only = [
            f"{len(names)} only in {folder}/ ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for folder, names in ((self.folders["train"].name, train - val), (self.folders["val"].name, val - train))
            if names
        ]
        raise ConfigError(f"data.root={self.root}: train and val hold different classes: {' and '.join(only)}.")
