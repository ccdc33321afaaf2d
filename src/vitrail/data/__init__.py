"""Where pictures and labels come from: sources, augmentation, mixing, sampling, and the data modules that join them."""

from vitrail.data.augment import Augmentation
from vitrail.data.datamodule import ImageDataModule, ImageNetDataModule
from vitrail.data.images import load_image
from vitrail.data.mixing import Mixing

__all__ = ["Augmentation", "ImageDataModule", "ImageNetDataModule", "Mixing", "load_image"]
