"""Data: sources, augmentation, label maps, mixing, sampling, and the data module that combines them."""

from vitrail.data.augment import Augmentation
from vitrail.data.datamodule import ImageDataModule, ImageFolderDataModule, ImageNetDataModule
from vitrail.data.mixing import MixToken, MixupCutMix
from vitrail.data.sources import load_image

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "MixToken",
    "MixupCutMix",
    "load_image",
]
