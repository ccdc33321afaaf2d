"""Data: sources, augmentation, label maps, mixing, sampling, and the data module that combines them."""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.data.augment import Augmentation
    from vitrail.data.datamodule import ImageDataModule
    from vitrail.data.folder_datamodules import ImageFolderDataModule, ImageNetDataModule
    from vitrail.data.images import load_image
    from vitrail.data.mixing import MixToken, MixupCutMix
    from vitrail.data.phases import PhaseCalendar
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "MixToken",
    "MixupCutMix",
    "PhaseCalendar",
    "load_image",
]
