"""Data: sources, augmentation, label maps, mixing, sampling, and the data module that combines them."""

from vitrail.data.augment import Augmentation
from vitrail.data.datamodule import ImageDataModule, ImageFolderDataModule, ImageNetDataModule
from vitrail.data.images import load_image
from vitrail.data.mixing import MixToken, MixupCutMix

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "MixToken",
    "MixupCutMix",
    "load_image",
]
