"""ImageNet-1k, and the sets of images that were gathered to test its classifiers on.

All count classes as the published checkpoints do: by the order of their WordNet ids.
"""

import importlib.resources
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from vitrail.data.sources.contract import SplitName
from vitrail.data.sources.folders import FolderSplit, ImageFolder, class_folders
from vitrail.errors import ConfigError

log = logging.getLogger(__name__)

_SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}


def synsets(classes: str) -> list[str]:
    """WordNet ids of `imagenet-1k`, or of the 200 classes of `imagenet-a` or `imagenet-r`, in their order.

    Raises:
        ConfigError: another name.
    """
    if classes == "imagenet-1k":
        return ImageNetInfo(classes).label_names()
    if classes not in _SUBSETS:
        raise ConfigError(f"data.classes={classes}: choose imagenet-1k, {', '.join(_SUBSETS)}.")
    return _timm_file(_SUBSETS[classes]).split()


def _timm_file(name: str) -> str:
    return importlib.resources.files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")


class ImageNet(ImageFolder):
    """ImageNet-1k as an image folder, class folders named by WordNet id (Russakovsky et al., arXiv:1409.0575).

    Raises:
        ConfigError: as `ImageFolder`; or the class folders are not the 1000 of ImageNet-1k, in whose order the
            published checkpoints count.
    """

    def __init__(
        self,
        root: str | None,
        train_dir: str | None = "train",
        val_dir: str = "val",
        index: str | Path | None = None,
    ) -> None:
        super().__init__(root, train_dir, val_dir, index)
        if problem := _difference(self.classes, synsets("imagenet-1k")):
            raise ConfigError(
                f"data.root={self.root}: {len(self.classes)} class folders are not the 1000 of ImageNet-1k ({problem});"
                " use data=imagefolder for other classes."
            )


class RealSplit(FolderSplit):
    """ImageNet's validation images with every label that people found right for each (Beyer et al., arXiv:2006.07159).

    Attributes:
        label_sets: of each image, the indices of its classes; empty for the 3,163 of 50,000 that show none, which do
            not count.
    """

    def __init__(self, root: Path, classes: list[str]) -> None:
        super().__init__(root, classes)
        reassessed = json.loads(_timm_file("imagenet_real_labels.json"))
        self.label_sets: list[tuple[int, ...]] = []
        for key in self.keys():
            match = re.search(r"ILSVRC2012_val_(\d{8})", key)
            if match is None or not 1 <= int(match[1]) <= len(reassessed):
                raise ConfigError(
                    f"data.root: {root / key} is not named as an image of ImageNet's validation"
                    " (ILSVRC2012_val_00000001.JPEG ...), by which ReaL labels are found."
                )
            self.label_sets.append(tuple(reassessed[int(match[1]) - 1]))


class ImageNetReal(ImageNet):
    """ImageNet's validation images under their ReaL labels: `root` and `val_dir` as of `ImageNet`.

    Raises:
        ConfigError: as `ImageNet`.
    """

    def __init__(self, root: str | None, val_dir: str = "val") -> None:
        super().__init__(root, None, val_dir)

    def open(self, split: SplitName) -> RealSplit:
        """The validation split.

        Raises:
            ConfigError: another split; an image whose name is not ImageNet's.
        """
        super().open(split)
        return RealSplit(self.folders[split], self.classes)


class ImageNetVariant:
    """One folder of class folders, as the archives of ImageNetV2, -A, -R and -Sketch unpack; to evaluate on only.

    Folders are named by WordNet id, or by index (0 to 999) as in ImageNetV2, whose order as text is another.

    Args:
        root: the folder.
        classes: `imagenet-1k`, `imagenet-a` or `imagenet-r`.
        images: how many there are when all are there; another number is warned of.

    Raises:
        ConfigError: the folder is missing, or holds other class folders.
    """

    def __init__(self, root: str | None, classes: str = "imagenet-1k", images: int | None = None) -> None:
        if not root:
            raise ConfigError("data.root: not set; give the folder that holds the class folders, data.root=/path.")
        self.root, self.images = Path(root).expanduser().absolute(), images
        if not self.root.is_dir():
            raise ConfigError(f"data.root={self.root}: no such folder.")
        self.classes = synsets(classes)
        found = sorted(class_folders(self.root))
        numbers = [str(index) for index in range(len(self.classes))]
        self.folders = numbers if sorted(numbers) == found else self.classes
        if problem := _difference(found, self.folders):
            raise ConfigError(
                f"data.root={self.root}: {len(found)} class folders are not the {len(self.classes)} of {classes}"
                f" ({problem})."
            )

    def prepare(self) -> None:
        """Nothing to do: the files are the user's."""

    def open(self, split: SplitName) -> FolderSplit:
        """The images, as validation split.

        Raises:
            ConfigError: another split.
        """
        if split != "val":
            raise ConfigError(f"data.root={self.root}: holds images to evaluate on, with src/eval.py, only.")
        images = FolderSplit(self.root, self.folders)
        if self.images is not None and len(images) != self.images:
            log.warning("data.root=%s: %d images; the published set has %d", self.root, len(images), self.images)
        return images


def _difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """What is missing and what is unknown; empty where both are the same classes."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not missing and not extra:
        return ""
    first = f", first {missing[0]}" if missing else ""
    return f"{len(missing)} missing{first}; {len(extra)} unknown{f', first {extra[0]}' if extra else ''}"
