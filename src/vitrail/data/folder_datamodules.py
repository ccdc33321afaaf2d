"""Data modules of image folders, for use from Python; configs name the source instead."""

from typing import Any

from vitrail.data.augment import Augmentation
from vitrail.data.datamodule import ImageDataModule
from vitrail.data.sources import ImageFolder, ImageNet


class ImageFolderDataModule(ImageDataModule):
    """`ImageDataModule` of an `ImageFolder`, for use from Python; configs name the source instead.

    Args:
        root: folder that holds `train/` and `val/`.
        augment: as in `ImageDataModule`; Inception's crop and a flip by default.
        kwargs: arguments of `ImageFolder` (`train_dir`, `val_dir`, `index`, `value_range`) and of `ImageDataModule`.
    """

    source_type: type[ImageFolder] = ImageFolder

    def __init__(self, root: str | None, augment: Augmentation | None = None, **kwargs: Any) -> None:
        named = {name: kwargs.pop(name) for name in ("train_dir", "val_dir", "index", "value_range") if name in kwargs}
        super().__init__(self.source_type(root, **named), augment or Augmentation(), root=root, **kwargs)


class ImageNetDataModule(ImageFolderDataModule):
    """`ImageDataModule` of ImageNet-1k, a folder of `train/` and `val/` with the 1000 class folders each."""

    source_type = ImageNet
