"""ImageNet-1k as it is published: the official archives, and Kaggle's layout.

Both give the classes, keys and order of class folders, so the same seed trains on the same batches.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrail.data.images import read_image
from vitrail.data.sources.contract import Encoded, SplitName
from vitrail.data.sources.folders import FolderSplit, read_file
from vitrail.data.sources.imagenet import difference, synsets
from vitrail.data.sources.imagenet_labels import SOLUTION, label_file, val_labels
from vitrail.data.sources.imagenet_names import stem_of
from vitrail.data.sources.index import FileIndex
from vitrail.data.sources.ranges import RangeSplit
from vitrail.data.sources.table_sources import TableSource
from vitrail.data.sources.tables import Strings, Table, TableBuilder, cached
from vitrail.data.sources.tars import Member, members, nested_members
from vitrail.errors import ConfigError
from vitrail.types import Sample
from vitrail_runtime.checking import checked

_KAGGLE_MAPPING = "LOC_synset_mapping.txt"


@checked
class ImageNetArchives(TableSource):
    """Source of the official archives, which are read without unpacking them.

    The labels of the validation images come from the development kit (an archive, or the folder that it unpacks to), or
    else from Kaggle's `LOC_val_solution.csv`. The kit numbers the classes in an order of its own, which its `meta.mat`
    translates to WordNet ids.

    Args:
        root: folder of the archives.
        train: name of the archive of 1000 archives; None if there is only validation data.
        val: name of the archive of validation images.
        devkit: name of the development kit.
        index: folder that caches the places of the images; None lists the archives at every start.

    Raises:
        ConfigError: a file is missing or damaged, or its classes are not those of ImageNet-1k.
    """

    wanted = "the name of the archive"

    def __init__(
        self,
        root: str | None,
        train: str | None = "ILSVRC2012_img_train.tar",
        val: str = "ILSVRC2012_img_val.tar",
        devkit: str = "ILSVRC2012_devkit_t12.tar.gz",
        index: str | Path | None = None,
    ) -> None:
        self.root = _folder(root, val)
        files: dict[SplitName, Path] = {"val": self.root / val}
        if train is not None:
            files["train"] = self.root / train
        self.files = files
        for key, archive in files.items():
            if not archive.is_file():
                raise ConfigError(
                    f"data.root={self.root}: contains no {archive.name}. Put the archive there, or set"
                    f" data.source.{key} to its name."
                )
        self.devkit, self.index = devkit, Path(index) if index else None
        self.classes = synsets("imagenet-1k")

    def open(self, split: SplitName) -> RangeSplit:
        """Return a split, listing its archive.

        Raises:
            ConfigError: there is no such split, the archive is damaged, or validation images have no labels.
        """
        path = self.files_of(split)
        files, build = [path], self._train_table
        if split == "val":
            files, build = [path, label_file(self.root, self.devkit)], self._val_table
        return RangeSplit([path], cached(self.index, files, {"imagenet": split}, build))

    def _train_table(self) -> Table:
        path, found = self.files["train"], {}
        for name, images in nested_members(path):
            found[stem_of(name)] = sorted(images, key=lambda member: member.name)
        if problem := difference(list(found), self.classes):
            raise ConfigError(f"{path}: its {len(found)} archives are not the 1000 classes of ImageNet-1k ({problem}).")
        return _table([(label, member) for label, wnid in enumerate(self.classes) for member in found[wnid]])

    def _val_table(self) -> Table:
        path = self.files["val"]
        label_of = val_labels(label_file(self.root, self.devkit))
        labelled = [(label_of(member.name), member) for member in members(path)]
        if not labelled:
            raise ConfigError(f"{path}: contains no images; download the archive again.")
        return _table(sorted(labelled, key=lambda item: (item[0], item[1].name)))


def _table(images: list[tuple[int, Member]]) -> Table:
    names, builder = synsets("imagenet-1k"), TableBuilder()
    for label, member in images:
        builder.add(0, member.offset, member.size, label, f"{names[label]}/{stem_of(member.name)}")
    return builder.table()


class ListedSplit:
    """Split of the image files in one folder, with labels from a list, in the order of class folders.

    Args:
        files: the files.
        label_of: maps the path of a file to its class.
        classes: names of the classes.
    """

    def __init__(self, files: FileIndex, label_of: Callable[[str], int], classes: list[str]) -> None:
        self.files = files
        paths = [files.path(index) for index in range(len(files))]
        labels = np.array([label_of(path) for path in paths], np.int64)
        self.order: NDArray[np.int64] = np.argsort(labels, kind="stable")  # the files are sorted by name
        self.labels = labels[self.order]
        self._keys = Strings.of(f"{classes[labels[index]]}/{stem_of(paths[index])}" for index in self.order)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_image(self._path(index), "type"), int(self.labels[index]), self._keys[index])

    def encoded(self, index: int) -> Encoded:
        """Return a file as it is stored.

        Raises:
            ImageError: it cannot be read.
        """
        return read_file(self._path(index))

    def keys(self) -> Strings:
        """Return the keys of all samples, in order."""
        return self._keys

    def _path(self, index: int) -> Path:
        return self.files.root / self.files.path(int(self.order[index]))


@checked
class ImageNetKaggle:
    """Source of Kaggle's layout: training images in class folders, validation images in one folder with a list.

    Args:
        root: folder that contains `ILSVRC/` and `LOC_val_solution.csv`.
        index: folder that caches the lists of files; None lists the files at every start.

    Raises:
        ConfigError: a folder or list is missing, or the classes are not those of ImageNet-1k.
    """

    splits: tuple[SplitName, ...] = ("train", "val")

    def __init__(self, root: str | None, index: str | Path | None = None) -> None:
        self.root, self.index = _folder(root, "ILSVRC/"), Path(index).expanduser() if index else None
        self.images = self.root / "ILSVRC" / "Data" / "CLS-LOC"
        self.classes = synsets("imagenet-1k")
        for folder in (self.images / "train", self.images / "val"):
            if not folder.is_dir():
                raise ConfigError(
                    f"data.root={self.root}: contains no folder {folder.relative_to(self.root)}. Set data.root to the"
                    " folder that Kaggle's archive was unpacked in."
                )
        mapping = self.root / _KAGGLE_MAPPING
        if mapping.is_file():
            named = [line.split()[0] for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip()]
            if problem := difference(named, self.classes):
                raise ConfigError(f"{mapping}: its classes are not the 1000 of ImageNet-1k ({problem}).")

    def prepare(self) -> None:
        """List the files once, if the lists are cached for the other processes."""
        if self.index:
            FileIndex(self.images / "train", self.classes, self.index)
            FileIndex(self.images, ["val"], self.index)

    def open(self, split: SplitName) -> FolderSplit | ListedSplit:
        """Return a split, listing its files.

        Raises:
            ConfigError: class folders are missing or empty, or a validation image has no label.
        """
        if split == "val":
            solution = self.root / SOLUTION
            if not solution.is_file():
                raise ConfigError(
                    f"data.root={self.root}: contains no {SOLUTION}, which has the labels of the validation images."
                    " Put Kaggle's file there."
                )
            return ListedSplit(FileIndex(self.images, ["val"], self.index), val_labels(solution), self.classes)
        folders = [entry.name for entry in (self.images / "train").iterdir() if entry.is_dir()]
        if problem := difference(folders, self.classes):
            raise ConfigError(
                f"{self.images / 'train'}: its {len(folders)} folders are not the 1000 of ImageNet-1k ({problem})."
            )
        train = FolderSplit(self.images / "train", self.classes, self.index)
        if not train.files.counts.all():
            empty = self.classes[int(np.argmin(train.files.counts))]
            raise ConfigError(f"{self.images / 'train' / empty}: contains no image; unpack Kaggle's archive again.")
        return train


def _folder(root: str | None, content: str) -> Path:
    if not root:
        raise ConfigError(f"data.root: not set. Set it to the folder that holds {content}: data.root=/path/to/it.")
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        raise ConfigError(f"data.root={path}: no such folder. Set data.root to the folder that holds {content}.")
    return path
