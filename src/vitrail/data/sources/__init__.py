"""Sources of images: folders, arrays in memory, torchvision's data sets, ImageNet and its variants.

A source has `classes` and opens the splits `train` and `val`. A split has a length and returns `Sample(PIL image, class
index, key)` by index. Images are decoded on access. To add a source, write a class in any module and a config with a
`source:` node.
"""

from vitrail.data.sources.arrays import ArraySplit, Digits, TorchvisionDataset
from vitrail.data.sources.contract import Source, Split, SplitName
from vitrail.data.sources.folders import FolderSplit, ImageFolder
from vitrail.data.sources.imagenet import ImageNet, ImageNetReal, ImageNetVariant

__all__ = [
    "ArraySplit",
    "Digits",
    "FolderSplit",
    "ImageFolder",
    "ImageNet",
    "ImageNetReal",
    "ImageNetVariant",
    "Source",
    "Split",
    "SplitName",
    "TorchvisionDataset",
]
