"""Datasets and the data module of images with masks.

Shapes: B images, H x W pixels.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitrail.data.augment import Augmentation
from vitrail.data.datamodule import ImageDataModule
from vitrail.data.dataset import ViewDataset
from vitrail.data.images import as_array
from vitrail.data.randomness import seeded
from vitrail.data.sampling import Draw, EpochSampler, sample_of
from vitrail.data.segmentation.augment import JointAugmentation
from vitrail.data.segmentation.checks import check_classes, check_pairs, joined
from vitrail.data.segmentation.folders import SegmentationFolder
from vitrail.errors import ConfigError, ImageError
from vitrail.types import IGNORE, MASK_IGNORE, Batch, ImageSize, InputSpec, Item
from vitrail_runtime.checking import RGB, Length, NonNegativeInt, Positive, PositiveInt, checked

log = logging.getLogger(__name__)

_MANY = 1000  # masks that take seconds to check
_NO_CLASSES = Augmentation()  # of the base class, which augments images without masks


class MaskedDataset(ViewDataset):
    """Dataset of a split's images with masks: augmented crops for training, whole images for evaluation.

    The index is a `Draw` of the sampler, or an integer. Unusable samples are handled as in `ViewDataset`.

    Args:
        split: images and masks.
        augment: augmentation of training images; None gives the whole image (3, H, W), uint8, and its mask.
        data: size and normalisation of training images.
        seed: seed of the augmentation.
        skipped: file that lists unusable images; None stops at the first.
    """

    def __init__(
        self, split: Any, augment: JointAugmentation | None, data: InputSpec, seed: int, skipped: Path | None
    ) -> None:
        super().__init__(split, None, None if augment is None else seed, skipped, fill=augment is not None)  # type: ignore[arg-type]
        self.augment, self.data = augment, data

    def _view(self, index: int, draw: Draw) -> Item:
        sample = self.split[index]
        image = as_tensor(sample.image)
        mask = torch.from_numpy(sample.mask)  # type: ignore[attr-defined]
        if self.augment is not None:
            with seeded(self.seed or 0, draw.epoch, draw.sample):
                image, mask = self.augment(image, mask, self.data.size, self.data.mean, self.data.std)
        return Item(image, mask, sample.key)


def collate(items: list[Item]) -> Batch:
    """Join items into a batch; the mask of a padding sample is `MASK_IGNORE` throughout."""
    masks = [
        torch.full(item.image.shape[1:], MASK_IGNORE, dtype=torch.uint8) if _is_padding(item) else item.label
        for item in items
    ]
    return Batch(torch.stack([item.image for item in items]), torch.stack(masks), [item.key for item in items])


def _is_padding(item: Item) -> bool:
    return not torch.is_tensor(item.label) and item.label == IGNORE


class PassSampler(EpochSampler):
    """`EpochSampler` of epochs with a fixed number of batches, drawn from one pass over the images after another.

    Segmentation is trained for a number of steps. An epoch is the part of the training between two evaluations. It
    continues the current pass over the images, in shuffled order, where the previous epoch stopped.

    Args:
        length: number of images.
        seed: seed of the shuffling.
        rank: rank of this process.
        world_size: number of processes.
        batch_size: images of one process in a step.
        batches: batches per epoch and process.
    """

    def __init__(self, length: int, seed: int, rank: int, world_size: int, batch_size: int, batches: int) -> None:
        super().__init__(length, seed, True, rank, world_size, batch_size)
        self.total = batches * batch_size * world_size

    def __iter__(self) -> Iterator[Draw]:
        if self._has_begun and not self._is_driven:
            self.epoch += 1
        self._has_begun = True
        done = self._done[1] if self.epoch == self._done[0] else 0
        current, order = -1, torch.empty(0, dtype=torch.int64)
        for position in range(self.rank + done * self.world_size, self.total, self.world_size):
            number, index = divmod(self.epoch * self.total + position, self.length)
            if number != current:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                current, order = number, torch.randperm(self.length, generator=generator)
            yield Draw(int(order[index]), number, False)


@checked
class SegmentationDataModule(ImageDataModule):
    """Training and validation batches of a source with masks.

    Training batches have images (B, 3, height, width), float32, normalised, and masks (B, height, width), uint8.
    Validation batches have one whole image (1, 3, H, W), uint8, and its mask: `DenseInference` resizes it as
    `eval_*` say, and predictions are compared at the image's own size.

    Args:
        source: images and masks.
        augment: augmentation for training; None for the defaults.
        image_size: side of the square crop, or (height, width), in pixels; also the sliding window's.
        mean: mean for normalisation, for R, G and B in [0, 1].
        std: standard deviation for normalisation.
        batch_size: images per step on one device.
        batches_per_epoch: batches per epoch on one device; None means one pass over the images.
        num_workers: loader workers per device; None means CPU cores / devices, at most 8.
        seed: seed of shuffling and augmentation.
        on_corrupt: `stop` at an image that cannot be used (unreadable, another size than its mask, unknown values, no
            labelled pixel), or `skip` it and list it in `skipped_file`.
        skipped_file: file that lists the skipped images.
        checked_images: images per split whose mask and size are checked before the training starts; None checks all,
            divided among the processes.
        short_side, long_side: size of images at ratio 1, for training (by reference in the config) and evaluation.
        eval_mode: `slide` a window over the image, or predict the `whole` image at once.
        eval_stride: pixels between two windows; None means two thirds of the window.
        eval_scales: factors of the image size whose predictions are averaged.
        eval_flip: also predict the mirrored image.
        root: folder of the data, which a config's source refers to as `${data.root}`; not used here.
        value_range: as `root`, for `${data.value_range}`; see `ImageFolder`.
        published_size: number of training images and of classes of a published data set.

    Raises:
        ConfigError: a value is invalid; the message names its key.
    """

    has_masks = True

    def __init__(
        self,
        source: SegmentationFolder,
        augment: JointAugmentation | None = None,
        image_size: ImageSize | None = 512,
        mean: RGB | None = (0.485, 0.456, 0.406),
        std: Annotated[Sequence[Positive], Length(3)] | None = (0.229, 0.224, 0.225),
        batch_size: PositiveInt = 4,
        batches_per_epoch: PositiveInt | None = None,
        num_workers: NonNegativeInt | None = None,
        seed: NonNegativeInt = 0,
        on_corrupt: Literal["stop", "skip"] = "stop",
        skipped_file: str | Path | None = None,
        checked_images: NonNegativeInt | None = None,
        short_side: PositiveInt = 512,
        long_side: PositiveInt = 2048,
        eval_mode: Literal["slide", "whole"] = "slide",
        eval_stride: ImageSize | None = None,
        eval_scales: Sequence[Positive] = (1.0,),
        eval_flip: bool = False,
        root: str | None = None,
        value_range: Annotated[Sequence[float], Length(2)] | None = None,
        published_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            source,  # type: ignore[arg-type]
            _NO_CLASSES,
            image_size=image_size,
            mean=mean,
            std=std,
            batch_size=batch_size,
            eval_batch_size=1,
            num_workers=num_workers,
            seed=seed,
            on_corrupt=on_corrupt,
            skipped_file=skipped_file,
            root=root,
            published_size=published_size,
        )
        if not hasattr(augment or JointAugmentation(), "max_class_share"):
            raise ConfigError(
                "augment: does not support masks; set augment=segmentation (experiment=segmentation does this)."
            )
        self.joint = augment or JointAugmentation(short_side, long_side)
        self.batches_per_epoch, self.checked_images = batches_per_epoch, checked_images
        self.short_side, self.long_side = short_side, long_side
        self.eval_mode, self.eval_stride = eval_mode, eval_stride
        self.eval_scales, self.eval_flip = tuple(eval_scales), eval_flip

    @property
    def input(self) -> InputSpec:
        """Input of the network in training."""
        return InputSpec(
            self.image_size, self.mean, self.std, "bilinear", value_range=getattr(self.source, "value_range", None)
        )

    @property
    def provides(self) -> frozenset[str]:
        """What the data provides: masks."""
        return frozenset({"masks"})

    def setup(self, stage: str | None = None) -> None:
        """Open the splits, and check their masks.

        Raises:
            ImageError: a checked image cannot be used, and `on_corrupt=stop`.
        """
        if stage in (None, "fit") and not hasattr(self, "train"):
            self.train = self._opened("train", self.joint)
        if not hasattr(self, "val"):
            self.val = self._opened("val", None)

    def _opened(self, name: Literal["train", "val"], augment: JointAugmentation | None) -> MaskedDataset:
        split = self.source.open(name)
        self._check(name, split)
        return MaskedDataset(split, augment, self.input, self.seed, self.skipped_file)

    def _check(self, name: str, split: Any) -> None:
        """Check the masks, divided among the processes.

        Raises:
            ImageError: see `setup`; in all processes alike.
        """
        chosen = sample_of(len(split), len(split) if self.checked_images is None else self.checked_images)
        if len(chosen) >= _MANY:
            log.info("%s: checking %d masks; data.checked_images limits their number", name, len(chosen))
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        parts = [check_pairs(split, [int(index) for index in chosen[rank::world_size]])]
        if world_size > 1:
            parts *= world_size
            torch.distributed.all_gather_object(parts, parts[rank])
        errors, turned, occurs = joined(parts)
        found = f"{len(errors)} of {len(chosen)} checked masks cannot be used, the first: " if errors[1:] else ""
        if errors and self.skipped_file is None:
            raise ImageError(f"{found}{errors[0]}")
        if errors:
            log.warning("%s: %s%s Such images are skipped.", name, found, errors[0])
        if name == "train" and len(chosen) == len(split):
            check_classes(self.source, occurs)
        if turned:
            log.warning(
                "%s: %d of %d checked images are turned by their EXIF orientation, the first is %s; make sure that"
                " their masks are upright too", name, len(turned), len(chosen), turned[0],
            )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Item]:
        """Return a loader of shuffled and augmented images, without incomplete batches.

        Raises:
            ConfigError: there are fewer images than one global batch.
        """
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if len(self.train) < self.batch_size * world_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} on {world_size} devices is more than the {len(self.train)} training"
                " images."
            )
        sampler = (
            self._sampler(self.train, shuffle=True)
            if self.batches_per_epoch is None
            else PassSampler(len(self.train), self.seed, rank, world_size, self.batch_size, self.batches_per_epoch)
        )
        return DataLoader(
            self.train,
            **{**self._loader_options(sampler, self.batch_size, self._loader_workers), "collate_fn": collate},
        )

    def val_dataloader(self) -> DataLoader[Item]:
        """Return a loader of all images in order, one at a time, because their sizes differ."""
        options = self._loader_options(self._sampler(self.val, shuffle=False), 1, self._loader_workers)
        return DataLoader(self.val, **{**options, "collate_fn": collate})


def as_tensor(picture: Any) -> Tensor:
    """Return a picture as a tensor (3, H, W) uint8."""
    return torch.from_numpy(as_array(picture).copy()).permute(2, 0, 1)
