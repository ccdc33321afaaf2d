"""Image folders with one subfolder per class."""

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
    """Split of the image files in a folder of class folders, sorted by path.

    Args:
        root: folder of the split.
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
        """Return the keys of all samples, in order: paths without extension."""
        return [path.rpartition(".")[0] for path in self.files.paths()]


def class_folders(folder: Path) -> Iterator[str]:
    """Return the names of the folders in `folder`, without hidden ones."""
    return (entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class ImageFolder:
    """Source of a `train/` and `val/` tree of class folders.

    Args:
        root: folder that contains `train_dir` and `val_dir`.
        train_dir: name of the training folder; None if there is only validation data.
        val_dir: name of the validation folder.
        index: folder that caches the lists of files; None lists the files at every start.

    Raises:
        ConfigError: a folder is missing or empty, or train and val have different classes. Unnoticed, that mistake
            gives 0 % accuracy while the loss decreases.
    """

    def __init__(
        self,
        root: str | None,
        train_dir: str | None = "train",
        val_dir: str = "val",
        index: str | Path | None = None,
    ) -> None:
        if not root:
            raise ConfigError(
                "data.root: not set. Set it to the folder that holds train/ and val/: data.root=/path/to/it."
            )
        self.root, self.index = Path(root).expanduser().absolute(), Path(index).expanduser() if index else None
        self.folders = {"val": self.root / val_dir} | ({"train": self.root / train_dir} if train_dir else {})
        if not self.root.is_dir():
            raise ConfigError(
                f"data.root={self.root}: no such folder. Set data.root to the folder that holds train/ and val/."
            )
        self.classes = self._find_classes("train" if train_dir else "val")
        self._check_same_classes(self._find_classes("val"))

    def prepare(self) -> None:
        """List the files once, if the lists are cached for the other processes."""
        if self.index:
            for folder in self.folders.values():
                FileIndex(folder, self.classes, self.index)

    def open(self, split: SplitName) -> FolderSplit:
        """Return a split, listing its files.

        Raises:
            ConfigError: a class folder of the split contains no image, or there is no such split.
        """
        if split not in self.folders:
            raise ConfigError(
                "data.source.train_dir: not set, so there is no training data. Set it to the training folder's name."
            )
        folder = FolderSplit(self.folders[split], self.classes, self.index)
        if not folder.files.counts.all():
            empty = self.classes[int(np.argmin(folder.files.counts))]
            raise ConfigError(
                f"data.root: class folder {self.folders[split] / empty} contains no image."
                " Add images, or remove the folder from train and val."
            )
        return folder

    def _find_classes(self, split: SplitName) -> list[str]:
        folder = self.folders[split]
        if not folder.is_dir():
            raise ConfigError(
                f"data.root={self.root}: contains no folder {folder.name}/. Create it with one subfolder per class."
            )
        classes = sorted(class_folders(folder))
        if not classes:
            flat = any(is_image(path.name) for path in folder.iterdir())
            what = "images but no class folders" if flat else "no class folders"
            raise ConfigError(f"data.root: {folder} contains {what}. Put the images into one folder per class.")
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
        raise ConfigError(
            f"data.root={self.root}: train and val have different classes: {' and '.join(only)}. Make them the same."
        )
