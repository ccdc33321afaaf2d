"""The LightningDataModules: a source, its augmentation and its loaders."""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from vitrail.data.augment import Augmentation, Pixels, Transform, ViewedTransform
from vitrail.data.imagenet import ImageNet, ImageNetReal, ImageNetVariant
from vitrail.data.label_maps import LabelMapJoin, LabelMapStore
from vitrail.data.randomness import seeded
from vitrail.data.sampling import Draw, EpochSampler
from vitrail.data.sources import Digits, ImageFolder, Source, Split, TorchvisionDataset
from vitrail.errors import ConfigError, ImageError
from vitrail.types import IGNORE, Sample

_GRACE_SECONDS = 60


class ViewDataset(Dataset[Sample]):
    """A split seen through a transform: `Sample((3, H, W), class index, key)` for each draw of the sampler.

    Args:
        split: where the pictures come from.
        transform: what becomes of them.
        seed: of the random draws in `transform`; None for a transform that draws nothing.
        skipped: file that lists unreadable images, which are then replaced by the next readable one; None stops at
            the first.
        fill: replace an unreadable image (training) rather than leaving it out of the count (validation).
        maps: label maps, which follow the view that `transform`, a `ViewedTransform` then, takes.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform | ViewedTransform,
        seed: int | None,
        skipped: Path | None = None,
        fill: bool = True,
        maps: LabelMapJoin | None = None,
    ) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self.skipped, self.fill, self.maps = skipped, fill, maps

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: Draw) -> Sample:
        index = draw.sample
        for _ in range(len(self.split)):
            try:
                sample = self._view(index, draw)
            except ImageError as error:
                if self.skipped is None:
                    raise
                with self.skipped.open("a", encoding="utf-8") as file:  # one short append: safe between workers
                    file.write(f"{error}\n")
                index = (index + 1) % len(self.split)
                draw = draw._replace(padding=draw.padding or not self.fill)
                continue
            return sample._replace(label=IGNORE) if draw.padding else sample
        raise ImageError(f"data.on_corrupt=skip: not one image of the split can be read, see {self.skipped}.")

    def _view(self, index: int, draw: Draw) -> Sample:
        sample = self.split[index]
        if self.seed is None:
            return sample._replace(image=self.transform(sample.image))
        with seeded(self.seed, draw.epoch, index, *((draw.repeat,) if draw.repeat else ())):
            transformed = self.transform(sample.image)
        if not isinstance(transformed, tuple):
            return sample._replace(image=transformed)
        assert self.maps is not None
        image, view = transformed
        return sample._replace(image=image, label_map=self.maps(index, sample.label, view, sample.image.size))


class ImageDataModule(L.LightningDataModule):
    """Training and validation batches of any source.

    Batches are `Sample(images (B, 3, H, W) float32, labels (B,) int64, keys list of B)`. In validation every image
    counts exactly once on any number of processes; samples that only fill a batch have the label `IGNORE`.

    Args:
        source: the data set.
        augment: augmentation of training and transform of evaluation.
        image_size: side of the square that the network sees, or (height, width), in pixels.
        mean: of the normalisation, for R, G and B in [0, 1].
        std: of the normalisation.
        hflip: probability of mirroring a training image, unless `augment` says otherwise.
        batch_size: images per step on one device.
        eval_batch_size: images per evaluation step on one device; None takes `batch_size`.
        num_workers: loader processes per device; None takes the machine's cores over its devices, at most 8.
        seed: of shuffling and augmentation.
        repeats: views of each image in an epoch, which sees 1 / repeats of the images (repeated augmentation).
        on_corrupt: `stop` at an image that cannot be read, or `skip` it and list it in `skipped_file`.
        skipped_file: where `skip` lists them.
        label_maps: folder of a label-map store, for training with token labels.
        on_missing_map: `error`, or `ignore`: the tokens of an image without a map all learn its label.
        square_maps: see `LabelMapJoin`.

    Raises:
        ConfigError: a value cannot work; the message names its key.
    """

    def __init__(
        self,
        source: Source,
        augment: Augmentation,
        image_size: int | Sequence[int] | None = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        hflip: float = 0.5,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        repeats: int = 1,
        on_corrupt: Literal["stop", "skip"] = "stop",
        skipped_file: str | Path | None = None,
        label_maps: str | Path | None = None,
        on_missing_map: Literal["error", "ignore"] = "error",
        square_maps: Literal["placed", "stretched"] = "placed",
    ) -> None:
        super().__init__()
        if on_corrupt not in ("stop", "skip"):
            raise ConfigError(f"data.on_corrupt={on_corrupt}: must be stop or skip.")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size={batch_size}: must be at least 1.")
        if repeats < 1:
            raise ConfigError(f"data.repeats={repeats}: must be at least 1.")
        if on_corrupt == "skip" and skipped_file is None:
            raise ConfigError("data.skipped_file: not set, but data.on_corrupt=skip has to list what it skips.")
        if image_size is None:
            raise ConfigError("data.image_size: not set; only src/eval.py can take it from a checkpoint.")
        self.source, self.augment, self.hflip, self.seed = source, augment, hflip, seed
        size = image_size if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        self.pixels = Pixels(size, tuple(mean), tuple(std))
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.repeats = num_workers, repeats
        self.label_maps, self.on_missing_map, self.square_maps = label_maps, on_missing_map, square_maps
        self.skipped_file = Path(skipped_file) if on_corrupt == "skip" and skipped_file else None

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.source.classes)

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls it on one process."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the splits."""
        if stage in (None, "fit") and not hasattr(self, "train"):
            self.train = self._training_set(self.source.open("train"))
        if not hasattr(self, "val"):
            transform = self.augment.evaluation(self.pixels)
            self.val = ViewDataset(self.source.open("val"), transform, None, self.skipped_file, fill=False)

    def _training_set(self, split: Split) -> ViewDataset:
        if self.label_maps is None:
            return ViewDataset(split, self.augment.training(self.pixels, self.hflip), self.seed, self.skipped_file)
        store = LabelMapStore.open(self.label_maps)
        maps = LabelMapJoin(store, split.keys(), self.classes, self.on_missing_map, self.square_maps)
        maps.check(split.labels)
        return ViewDataset(split, self.augment.viewed(self.pixels, self.hflip), self.seed, self.skipped_file, maps=maps)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, augmented, all batches full.

        Raises:
            ConfigError: there are fewer images than one global batch.
        """
        sampler = self._sampler(self.train, shuffle=True)
        if len(sampler) == 0:
            raise ConfigError(
                f"data.batch_size={self.batch_size} on {sampler.world_size} devices is more than "
                f"the {len(self.train)} training images."
            )
        return self._loader(self.train, sampler, self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample]:
        """In order, every image once."""
        return self._loader(self.val, self._sampler(self.val, shuffle=False), self.eval_batch_size)

    def _sampler(self, dataset: ViewDataset, shuffle: bool) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        repeats = self.repeats if shuffle else 1
        return EpochSampler(len(dataset), self.seed, shuffle, rank, world_size, self.batch_size, repeats)

    def _loader(self, dataset: ViewDataset, sampler: EpochSampler, batch_size: int) -> DataLoader[Sample]:
        workers = self._workers()
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator().manual_seed(self.seed),  # keeps the loader off the global random stream
            worker_init_fn=_leave_signals,
        )

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        devices = self.trainer.num_devices if self.trainer else 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(8, cores // devices))


def _leave_signals(_: int) -> None:
    """Let a worker leave signals, which a terminal or SLURM sends to every process, to the one that it loads for.

    That one has a minute to save after SIGTERM; it ends its workers itself, but for one that hangs.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)

    def end_later(*_: Any) -> None:
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end_later)


class DigitsDataModule(ImageDataModule):
    """The digits embedded in scikit-learn; arguments as `ImageDataModule` without `source`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Digits(), **kwargs)


class TorchvisionDataModule(ImageDataModule):
    """A data set of torchvision.

    Args:
        name: as in `TorchvisionDataset`.
        root: likewise.
        download: likewise.
        classes: likewise.
        kwargs: as `ImageDataModule`.
    """

    def __init__(self, name: str, root: str, download: bool, classes: list[str], **kwargs: Any) -> None:
        super().__init__(TorchvisionDataset(name, root, download, classes), **kwargs)


class ImageFolderDataModule(ImageDataModule):
    """Images of the user's own.

    Args:
        root: as in `ImageFolder`.
        train_dir: likewise.
        val_dir: likewise.
        index: likewise.
        augment: as in `ImageDataModule`, as all further arguments; Inception's crop and flip by default.
        kwargs: further arguments of `ImageDataModule`.
    """

    folder_type = ImageFolder

    def __init__(
        self,
        root: str | None,
        train_dir: str | None = "train",
        val_dir: str = "val",
        index: str | Path | None = None,
        augment: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(self.folder_type(root, train_dir, val_dir, index), augment or Augmentation(), **kwargs)


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet-1k from `root`, a folder that holds `train/` and `val/` with the 1000 class folders."""

    folder_type = ImageNet


class ImageNetRealDataModule(ImageDataModule):
    """ImageNet's validation images under their ReaL labels; arguments as of `ImageNetReal` and `ImageDataModule`."""

    def __init__(
        self, root: str | None, val_dir: str = "val", augment: Augmentation | None = None, **kwargs: Any
    ) -> None:
        super().__init__(ImageNetReal(root, val_dir), augment or Augmentation(), **kwargs)


class ImageNetVariantDataModule(ImageDataModule):
    """ImageNetV2, -A, -R, -Sketch to evaluate on; arguments as of `ImageNetVariant` and `ImageDataModule`."""

    def __init__(
        self,
        root: str | None,
        classes: str = "imagenet-1k",
        images: int | None = None,
        augment: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(ImageNetVariant(root, classes, images), augment or Augmentation(), **kwargs)
