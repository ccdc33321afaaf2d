"""Data sets as two splits of pictures. A new source is one class here (or anywhere) and one file in conf/data.

A source has `classes` and opens `train` and `val` splits; a split has a length and gives `Sample(PIL image, class
index, key)` by index. Nothing is decoded before it is asked for.
"""

import csv
import gzip
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrail.data.images import load_image
from vitrail.data.index import FileIndex, is_image
from vitrail.errors import ConfigError
from vitrail.types import Sample

SplitName = Literal["train", "val"]


class Split(Protocol):
    """One split: a sequence of samples."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        ...


class Source(Protocol):
    """A data set: its class names in the order of the class indices, and its splits."""

    classes: list[str]

    def open(self, split: SplitName) -> Split:
        """The training or validation split."""
        ...

    def prepare(self) -> None:
        """Download what is missing; called on one process only."""
        ...


class ArraySplit:
    """Pictures held in memory: `images` (N, H, W) or (N, H, W, 3) uint8, `labels` (N,)."""

    def __init__(self, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.name, self.images, self.labels = name, images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return Sample(image, int(self.labels[index]), f"{self.name}/{index:06d}")

    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        return [f"{self.name}/{index:06d}" for index in range(len(self))]


class Digits:
    """1,797 handwritten digits of 8 by 8 pixels, embedded in scikit-learn (UCI, Alpaydin and Kaynak).

    The file lists writers one after another; every fifth sample is held out, so both splits see every writer.
    """

    classes = [str(digit) for digit in range(10)]

    def prepare(self) -> None:
        """Nothing to do: the file is part of the installed package."""

    def open(self, split: SplitName) -> ArraySplit:
        """1,438 training or 359 validation samples."""
        # Read without importing scikit-learn, whose import takes longer than the whole file.
        packed = importlib.resources.files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()
        rows = np.array(list(csv.reader(gzip.decompress(packed).decode().splitlines())), dtype=np.float64)
        held_out = np.arange(len(rows)) % 5 == 4
        rows = rows[held_out if split == "val" else ~held_out]
        images = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        return ArraySplit(f"digits/{split}", images, rows[:, 64].astype(np.int64))


class TorchvisionDataset:
    """A data set of torchvision with a `train` flag and arrays in memory.

    Args:
        name: class of `torchvision.datasets`: FashionMNIST, CIFAR10, CIFAR100, MNIST, ...
        root: folder that holds its files, in torchvision's layout.
        download: fetch missing files.
        classes: class names.
    """

    def __init__(self, name: str, root: str, download: bool, classes: list[str]) -> None:
        self.name, self.root, self.download, self.classes = name, root, download, list(classes)

    def prepare(self) -> None:
        """Download what is missing, where allowed.

        Raises:
            ConfigError: the files are not there and cannot be had.
        """
        self._open("train", download=self.download)

    def open(self, split: SplitName) -> ArraySplit:
        """The training split, or torchvision's test split as validation."""
        data = self._open(split, download=False)
        return ArraySplit(f"{self.name}/{split}", np.asarray(data.data), np.asarray(data.targets, dtype=np.int64))

    def _open(self, split: SplitName, download: bool):  # type: ignore[no-untyped-def]  # torchvision has no common base
        from torchvision import datasets

        try:
            return getattr(datasets, self.name)(self.root, train=split == "train", download=download)
        except AttributeError as error:
            raise ConfigError(f"data.name={self.name}: torchvision has no such data set.") from error
        except (RuntimeError, OSError) as error:  # also what a failed download raises
            how = "downloading it failed" if download else "data.download=false"
            raise ConfigError(f"data.root={self.root}: {self.name} is not there and {how}.") from error


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
