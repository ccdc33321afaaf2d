"""Sources of images: folders, archives, packs, arrays in memory, torchvision's data sets, ImageNet and its variants.

A source has `classes` and opens the splits `train` and `val`. A split has a length and returns `Sample(PIL image, class
index, key)` by index. Images are decoded on access. To add a source, write a class in any module and a config with a
`source:` node.
"""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.data.sources.arrays import ArraySplit, Digits, TorchvisionDataset
    from vitrail.data.sources.contract import Encoded, Source, Split, SplitName, splits_of
    from vitrail.data.sources.folders import FolderSplit, ImageFolder
    from vitrail.data.sources.imagenet import ImageNet, ImageNetReal, ImageNetVariant
    from vitrail.data.sources.imagenet_releases import ImageNetArchives, ImageNetKaggle
    from vitrail.data.sources.packed import Packed
    from vitrail.data.sources.parquet import Parquet
    from vitrail.data.sources.webdataset import WebDataset
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "ArraySplit",
    "Digits",
    "Encoded",
    "FolderSplit",
    "ImageFolder",
    "ImageNet",
    "ImageNetArchives",
    "ImageNetKaggle",
    "ImageNetReal",
    "ImageNetVariant",
    "Packed",
    "Parquet",
    "Source",
    "Split",
    "SplitName",
    "TorchvisionDataset",
    "WebDataset",
    "splits_of",
]
