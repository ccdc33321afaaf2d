"""Data sets in memory: scikit-learn's digits and torchvision's small data sets.

Shapes: N images, H x W pixels.
"""

import csv
import gzip
from importlib.metadata import distribution

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrail.data.sources.contract import SplitName
from vitrail.errors import ConfigError
from vitrail.types import Sample
from vitrail_runtime.checking import checked


class ArraySplit:
    """Split in memory: `images` (N, H, W) or (N, H, W, 3) uint8, `labels` (N,) int64.

    Raises:
        ConfigError: the images are not uint8.
    """

    def __init__(self, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        if images.dtype != np.uint8:
            raise ConfigError(f"data.source: the images of {name} are {images.dtype}; scale them to uint8.")
        self.name, self.images, self.labels = name, images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return Sample(image, int(self.labels[index]), f"{self.name}/{index:06d}")

    def keys(self) -> list[str]:
        """Return the keys of all samples, in order."""
        return [f"{self.name}/{index:06d}" for index in range(len(self))]


class Digits:
    """Source of 1,797 handwritten digits of 8 x 8 pixels, included in scikit-learn (UCI, Alpaydin and Kaynak).

    Every fifth sample is used for validation. The file is ordered by writer, so both splits contain every writer.
    """

    classes = [str(digit) for digit in range(10)]
    is_demo = True
    """Too small for the published networks; training logs a warning."""

    def prepare(self) -> None:
        """Do nothing: the file is part of the installed package."""

    def open(self, split: SplitName) -> ArraySplit:
        """Return 1,438 training or 359 validation samples."""
        # Read the file without importing scikit-learn, because the import takes longer than reading.
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        with gzip.open(str(file), "rt") as lines:
            rows = np.array(list(csv.reader(lines)), dtype=np.float64)
        held_out = np.arange(len(rows)) % 5 == 4
        rows = rows[held_out if split == "val" else ~held_out]
        images = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        return ArraySplit(f"digits/{split}", images, rows[:, 64].astype(np.int64))


@checked
class TorchvisionDataset:
    """Source of a torchvision data set that has a `train` flag and arrays in memory.

    Args:
        name: class in `torchvision.datasets`: FashionMNIST, CIFAR10, CIFAR100, MNIST, ...
        root: folder of its files, in torchvision's layout.
        download: download missing files.
        classes: class names.
    """

    def __init__(self, name: str, root: str, download: bool, classes: list[str]) -> None:
        self.name, self.root, self.download, self.classes = name, root, download, list(classes)

    def prepare(self) -> None:
        """Download missing files, if allowed.

        Raises:
            ConfigError: files are missing and cannot be downloaded.
        """
        self._open("train", download=self.download)

    def open(self, split: SplitName) -> ArraySplit:
        """Return the training split, or torchvision's test split as validation split."""
        data = self._open(split, download=False)
        return ArraySplit(f"{self.name}/{split}", np.asarray(data.data), np.asarray(data.targets, dtype=np.int64))

    def _open(self, split: SplitName, download: bool):  # type: ignore[no-untyped-def]  # torchvision has no common base
        from torchvision import datasets

        try:
            return getattr(datasets, self.name)(self.root, train=split == "train", download=download)
        except AttributeError as error:
            raise ConfigError(
                f"data.source.name={self.name}: torchvision has no such data set;"
                " choose a class of torchvision.datasets."
            ) from error
        except (RuntimeError, OSError) as error:  # also what a failed download raises
            reason = "the download failed" if download else "data.source.download=false"
            raise ConfigError(
                f"data.root={self.root}: {self.name} is missing and {reason}. Put its files there."
            ) from error
