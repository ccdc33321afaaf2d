"""Where pictures and labels come from: sources, augmentation, mixing, sampling, and the data modules that join them."""

from vitrail.data.augment import Augmentation
from vitrail.data.datamodule import (
    DigitsDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    ImageNetRealDataModule,
    ImageNetVariantDataModule,
    TorchvisionDataModule,
)
from vitrail.data.images import load_image
from vitrail.data.mixing import Mixing, MixToken

__all__ = [
    "Augmentation",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "ImageNetRealDataModule",
    "ImageNetVariantDataModule",
    "MixToken",
    "Mixing",
    "TorchvisionDataModule",
    "load_image",
]
