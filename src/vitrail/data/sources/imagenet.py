"""ImageNet-1k, and the test sets for its classifiers: ReaL, ImageNetV2, -A, -R and -Sketch.

Classes are in the order of their WordNet ids, as in the published checkpoints.
"""

import importlib.resources
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from vitrail.data.sources.contract import Source, Split, SplitName
from vitrail.data.sources.folders import FolderSplit, ImageFolder, class_folders
from vitrail.errors import ConfigError
from vitrail.types import Sample
from vitrail_runtime.checking import PositiveInt, checked

log = logging.getLogger(__name__)

_SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}


def synsets(classes: str) -> list[str]:
    """Return the WordNet ids of `imagenet-1k`, or of the 200 classes of `imagenet-a` or `imagenet-r`, in order.

    Raises:
        ConfigError: the name is unknown.
    """
    if classes == "imagenet-1k":
        return ImageNetInfo(classes).label_names()
    if classes not in _SUBSETS:
        raise ConfigError(f"data.source.classes={classes}: choose imagenet-1k, {' or '.join(_SUBSETS)}.")
    return _timm_file(_SUBSETS[classes]).split()


def _timm_file(name: str) -> str:
    return importlib.resources.files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")


@checked
class ImageNet(ImageFolder):
    """ImageNet-1k as an image folder, class folders named by WordNet id (Russakovsky et al., arXiv:1409.0575).

    Args:
        root: folder that contains `train_dir` and `val_dir`.
        kwargs: other arguments of `ImageFolder`.

    Raises:
        ConfigError: as `ImageFolder`; or the class folders are not the 1000 of ImageNet-1k, so class indices would not
            match the published checkpoints.
    """

    def __init__(self, root: str | None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if problem := difference(self.classes, synsets("imagenet-1k")):
            raise ConfigError(
                f"data.root={self.root}: {len(self.classes)} class folders are not the 1000 of ImageNet-1k ({problem});"
                " use data=imagefolder for other classes."
            )


class RealSplit:
    """Validation images of ImageNet with the reassessed (ReaL) labels of Beyer et al. (arXiv:2006.07159).

    Args:
        images: the images, with ImageNet's names in their keys.

    Attributes:
        label_sets: class indices of each image; empty for the 3,163 of 50,000 images that show none of the classes,
            which are not counted.

    Raises:
        ConfigError: the name of an image is not ImageNet's.
    """

    def __init__(self, images: Split) -> None:
        self.images, self.labels = images, images.labels
        self.value_range = getattr(images, "value_range", "type")
        if hasattr(images, "encoded"):
            self.encoded = images.encoded
        reassessed = json.loads(_timm_file("imagenet_real_labels.json"))
        self.label_sets: list[tuple[int, ...]] = []
        keys = images.keys()
        for key in keys:
            match = re.search(r"ILSVRC2012_val_(\d{8})", key)
            if match is None or not 1 <= int(match[1]) <= len(reassessed):
                raise ConfigError(
                    f"data.root: {key} is not named like ImageNet's validation images"
                    " (ILSVRC2012_val_00000001.JPEG ...). ReaL labels need the original names."
                )
            self.label_sets.append(tuple(reassessed[int(match[1]) - 1]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index]

    def keys(self) -> Sequence[str]:
        """Return the keys of all samples, in order."""
        return self.images.keys()


@checked
class ImageNetReal:
    """Source of ImageNet's validation images with ReaL labels.

    Args:
        root: folder that contains `val_dir`, as in `ImageNet`.
        val_dir: name of the validation folder.
        images: another source of ImageNet-1k to take the validation images from, such as archives, Kaggle's layout or a
            pack; `root` and `val_dir` are not used then.

    Raises:
        ConfigError: as `ImageNet`; or `images` has other classes.
    """

    splits: tuple[SplitName, ...] = ("val",)

    def __init__(self, root: str | None = None, val_dir: str = "val", images: Any = None) -> None:
        self.images: Source = ImageNet(root, train_dir=None, val_dir=val_dir) if images is None else images
        self.classes = self.images.classes
        if self.classes != synsets("imagenet-1k"):
            problem = difference(self.classes, synsets("imagenet-1k")) or "another order"
            raise ConfigError(f"data.source.images: its classes are not the 1000 of ImageNet-1k ({problem}).")

    def prepare(self) -> None:
        """Prepare the source of the images."""
        self.images.prepare()

    def open(self, split: SplitName) -> RealSplit:
        """Return the validation split.

        Raises:
            ConfigError: the split is not `val`, or the name of an image is not ImageNet's.
        """
        if split != "val":
            raise ConfigError("data.source: ReaL labels are for evaluation only; use src/eval.py.")
        return RealSplit(self.images.open(split))


@checked
class ImageNetVariant:
    """Source of one folder of class folders, as in the archives of ImageNetV2, -A, -R and -Sketch; evaluation only.

    Class folders are named by WordNet id, or by index (0 to 999) as in ImageNetV2. Indices are sorted as numbers.

    Args:
        root: folder that contains the class folders.
        classes: `imagenet-1k`, `imagenet-a` or `imagenet-r`.
        images: number of images in the published set; any other number logs a warning.

    Raises:
        ConfigError: the folder is missing, or contains other class folders.
    """

    splits: tuple[SplitName, ...] = ("val",)

    def __init__(self, root: str | None, classes: str = "imagenet-1k", images: PositiveInt | None = None) -> None:
        if not root:
            raise ConfigError("data.root: not set. Set it to the folder that holds the class folders: data.root=/path.")
        self.root, self.images = Path(root).expanduser().absolute(), images
        if not self.root.is_dir():
            raise ConfigError(
                f"data.root={self.root}: no such folder. Set data.root to the folder that holds the class folders."
            )
        self.classes = synsets(classes)
        found = sorted(class_folders(self.root))
        numbers = [str(index) for index in range(len(self.classes))]
        self.folders = numbers if sorted(numbers) == found else self.classes
        if problem := difference(found, self.folders):
            raise ConfigError(
                f"data.root={self.root}: {len(found)} class folders are not the {len(self.classes)} of {classes}"
                f" ({problem})."
            )

    def prepare(self) -> None:
        """Do nothing: the user provides the files."""

    def open(self, split: SplitName) -> FolderSplit:
        """Return the images as validation split.

        Raises:
            ConfigError: the split is not `val`.
        """
        if split != "val":
            raise ConfigError(f"data.root={self.root}: this data is for evaluation only; use src/eval.py.")
        images = FolderSplit(self.root, self.folders)
        if self.images is not None and len(images) != self.images:
            log.warning("data.root=%s: %d images; the published set has %d", self.root, len(images), self.images)
        return images


def difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """Describe missing and unknown classes; empty if both are the same."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not missing and not extra:
        return ""
    first = f", first {missing[0]}" if missing else ""
    return f"{len(missing)} missing{first}; {len(extra)} unknown{f', first {extra[0]}' if extra else ''}"
