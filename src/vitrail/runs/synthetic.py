"""Batches made in advance, to measure or check a training without its data."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.data import ImageDataModule
from vitrail.objectives.contract import needs_of
from vitrail.runs.config import instantiate
from vitrail.types import Batch, LabelMap

_MAP = (5, 18, 18)
"""Scores per cell, rows and columns of a label map: those of the published maps of 576-pixel images."""


class _Classes:
    """Source that has class names and no images."""

    def __init__(self, count: int) -> None:
        self.classes = [str(number) for number in range(count)]

    def prepare(self) -> None:
        """Do nothing: there are no files."""


class _Repeated(Dataset[Batch]):
    """The same batches again and again, `count` in total."""

    def __init__(self, batches: list[Batch], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


class SyntheticData(ImageDataModule):
    """Data module that repeats two random batches, which lie on the training device.

    Mixing changes their pixels in place, as it does those of other batches; what a step takes does not depend on them.

    Args:
        num_classes: number of classes, C.
        count: batches per epoch.
        has_maps: provide random label maps.
        kwargs: further arguments of `ImageDataModule`.
    """

    def __init__(self, num_classes: int, count: int, has_maps: bool = False, **kwargs: Any) -> None:
        super().__init__(_Classes(num_classes), label_maps="synthetic" if has_maps else None, **kwargs)  # type: ignore[arg-type]
        self.count = count

    def setup(self, stage: str | None = None) -> None:
        """Do nothing: there are no files."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the repeated batches."""
        random = torch.Generator().manual_seed(self.seed)
        batches = [self._batch(random) for _ in range(2)]
        return DataLoader(_Repeated(batches, self.count), batch_size=None)

    def val_dataloader(self) -> list[Any]:
        """Return no loader."""
        return []

    def _batch(self, random: torch.Generator) -> Batch:
        size = self.batch_size

        def integers(*shape: int) -> Tensor:
            return torch.randint(self.num_classes, shape, generator=random)

        maps = None
        if self.label_maps is not None:
            scores = 10 * torch.rand(size, *_MAP, generator=random)
            box = torch.tensor([0.1, 0.2, 0.8, 0.9]).expand(size, 4).contiguous()
            maps = LabelMap(scores.half(), integers(size, *_MAP).int(), box, torch.arange(size) % 2 > 0)
            maps = LabelMap(*(part.to(self._device) for part in maps))
        images = torch.randn(size, 3, *self.image_size, generator=random).to(self._device)
        return Batch(images, integers(size).to(self._device), [""] * size, maps)


def synthetic_data(config: DictConfig, count: int) -> SyntheticData:
    """Return synthetic data with the image size, classes and batch size of a training's config.

    The config's `data` is replaced by these settings, in place, and its weights are random: nothing is read.

    Args:
        config: config of a training.
        count: batches per epoch.
    """
    needs = needs_of(instantiate(config.objective, "objective"))
    node = config.data
    classes = (node.get("published_size") or (None, None))[1] or config.model.get("num_classes") or 1000
    kept = {key: node[key] for key in ("image_size", "mean", "std", "batch_size", "seed") if node.get(key) is not None}
    has_maps = "token_targets" in needs or ("teacher_logits" in needs and config.get("teacher") is None)
    config.data = kept
    config.init_from = None
    if "pretrained" in config.model:
        config.model.pretrained = False
    return SyntheticData(int(classes), count, has_maps, augment=instantiate(config.augment, "augment"), **kept)
