"""Image folders with one subfolder per class."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from vitrail.data.bit_depth import ValueRange
from vitrail.data.images import read_image
from vitrail.data.sampling import sample_of
from vitrail.data.sources.contract import Encoded, SplitName
from vitrail.data.sources.files import (
    describe_ignored,
    is_hidden,
    is_image,
    is_system_folder,
    normal_form,
)
from vitrail.data.sources.index import FileIndex
from vitrail.data.sources.value_range import SAMPLE, given_range, sampled_range
from vitrail.errors import ConfigError, ImageError
from vitrail.types import Sample
from vitrail_runtime.checking import Length, checked
from vitrail_runtime.names import readable

log = logging.getLogger(__name__)


class FolderSplit:
    """Split of the image files in a folder of class folders, sorted by path.

    Args:
        root: folder of the split.
        folders: names of its class folders, in the order of the class indices.
        cache: see `FileIndex`.
        value_range: see `read_image`.
    """

    def __init__(
        self,
        root: Path,
        folders: list[str],
        cache: Path | None = None,
        value_range: ValueRange | Literal["type"] = "type",
    ) -> None:
        self.root, self.files = root, FileIndex(root, folders, cache)
        self.value_range: ValueRange | Literal["type"] = value_range
        if self.files.ignored:
            log.info("%s: ignored %s", root, describe_ignored(self.files.ignored))

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples."""
        return self.files.labels

    @property
    def ignored(self) -> dict[str, int]:
        """Number of files and folders that are not images, by kind."""
        return self.files.ignored

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label, key = self.files.entry(index)
        return Sample(read_image(f"{self.root}/{path}", self.value_range), label, key)  # joining paths takes longer

    def encoded(self, index: int) -> Encoded:
        """Return a file as it is stored.

        Raises:
            ImageError: it cannot be read.
        """
        return read_file(self.root / self.files.path(index))

    def keys(self) -> list[str]:
        """Return the keys of all samples, in order: paths without extension."""
        return self.files.keys()


def read_file(path: Path) -> Encoded:
    """Read an image file without decoding it.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return Encoded(path.read_bytes(), str(path))
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}).") from error


def class_folders(folder: Path) -> Iterator[str]:
    """Return the names of the folders in `folder`, without hidden ones and those that systems create."""
    return (
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not is_hidden(entry.name) and not is_system_folder(entry.name)
    )


@checked
class ImageFolder:
    """Source of a `train/` and `val/` tree of class folders.

    Args:
        root: folder that contains `train_dir` and `val_dir`.
        train_dir: name of the training folder; None if there is only validation data.
        val_dir: name of the validation folder.
        index: folder that caches the lists of files; None lists the files at every start.
        value_range: values that are black and white in images with more than 8 bits per channel; None finds them from a
            sample of the training images (or of the validation images without `train_dir`), see `find_value_range`.

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
        value_range: Annotated[Sequence[float], Length(2)] | None = None,
    ) -> None:
        if not root:
            raise ConfigError(
                "data.root: not set. Set it to the folder that holds train/ and val/: data.root=/path/to/it."
            )
        self.root, self.index = Path(root).expanduser().absolute(), Path(index).expanduser() if index else None
        self.folders = {"val": self.root / val_dir} | ({"train": self.root / train_dir} if train_dir else {})
        self.value_range = given_range(value_range)
        if not self.root.is_dir():
            raise ConfigError(
                f"data.root={self.root}: no such folder. Set data.root to the folder that holds train/ and val/."
            )
        self.class_folders = self._find_class_folders("train" if train_dir else "val")
        self._check_same_classes(self._find_class_folders("val"))
        self.classes = [readable(name) for name in self.class_folders]

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Splits that have a folder."""
        return ("train", "val") if "train" in self.folders else ("val",)

    def prepare(self) -> None:
        """List the files once, if the lists are cached for the other processes."""
        if self.index:
            for folder in self.folders.values():
                FileIndex(folder, self.class_folders, self.index)

    def open(self, split: SplitName) -> FolderSplit:
        """Return a split, listing its files.

        Raises:
            ConfigError: a class folder of the split contains no image, or there is no such split.
        """
        if split not in self.folders:
            raise ConfigError(
                "data.source.train_dir: not set, so there is no training data. Set it to the training folder's name."
            )
        folder = FolderSplit(self.folders[split], self.class_folders, self.index)
        if not folder.files.counts.all():
            empty = self.classes[int(np.argmin(folder.files.counts))]
            raise ConfigError(
                f"data.root: class folder {self.folders[split] / empty} contains no image."
                " Add images, or remove the folder from train and val."
            )
        if self.value_range is None:
            self._find_value_range(folder.files if split == "train" or "train" not in self.folders else None)
        folder.value_range = self.value_range or "type"
        return folder

    def _find_value_range(self, files: FileIndex | None) -> None:
        """Find the value range of the training images, `files` if they are listed already."""
        if files is None:
            files = FileIndex(self.folders["train"], self.class_folders, self.index)
        sample = [files.root / files.path(int(index)) for index in sample_of(len(files), SAMPLE)]
        self.value_range = sampled_range(sample)

    def _find_class_folders(self, split: SplitName) -> list[str]:
        folder = self.folders[split]
        if not folder.is_dir():
            raise ConfigError(
                f"data.root={self.root}: contains no folder {folder.name}/. Create it with one subfolder per class."
            )
        names = sorted(class_folders(folder))
        if not names:
            flat = any(is_image(path.name) for path in folder.iterdir())
            what = "images but no class folders" if flat else "no class folders"
            raise ConfigError(f"data.root: {folder} contains {what}. Put the images into one folder per class.")
        names_by_form: dict[str, str] = {}
        for name in names:
            if names_by_form.setdefault(normal_form(name), name) != name:
                raise ConfigError(
                    f"data.root: {folder} contains the class folder {normal_form(name)} twice, in two Unicode forms;"
                    " merge them."
                )
        return names

    def _check_same_classes(self, val_classes: list[str]) -> None:
        train, val = set(self.class_folders), set(val_classes)
        if train == val:
            return
        if both := {normal_form(name) for name in train - val} & {normal_form(name) for name in val - train}:
            raise ConfigError(
                f"data.root={self.root}: train and val write the class {min(both)} in two Unicode forms, as Macs and"
                " other systems do; rename one of the folders."
            )
        only = [
            f"{len(names)} only in {folder}/ ({_first(names)})"
            for folder, names in ((self.folders["train"].name, train - val), (self.folders["val"].name, val - train))
            if names
        ]
        raise ConfigError(
            f"data.root={self.root}: train and val have different classes: {' and '.join(only)}. Make them the same."
        )


def _first(names: set[str]) -> str:
    return ", ".join(map(readable, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
