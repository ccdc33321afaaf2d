"""The LightningDataModules: data source, augmentation and loaders."""

import os
import signal
import threading
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitrail.data.augment import Augmentation, Transform
from vitrail.data.dataset import TrainingTransform, ViewDataset, collate
from vitrail.data.label_maps import LabelMapJoin, LabelMapStore
from vitrail.data.phases import PhasedViews, Phases
from vitrail.data.render import PILRenderer
from vitrail.data.sampling import EpochSampler
from vitrail.data.sources import Source, Split
from vitrail.data.views import TrainingViews
from vitrail.errors import ConfigError
from vitrail.types import ImageSize, InputSpec, Item, height_width
from vitrail_runtime.checking import RGB, Length, NonNegativeInt, Positive, PositiveInt, Share, checked

if TYPE_CHECKING:
    from vitrail.data.cached_features import CachedFeatures

_GRACE_SECONDS = 60


@checked
class ImageDataModule(L.LightningDataModule):
    """Training and validation batches of any source.

    The loaders return `Batch`es. In validation every image counts exactly once on any number of processes; samples that
    only fill a batch have the label `IGNORE`.

    Args:
        source: the data set.
        augment: augmentation for training, and transform for evaluation.
        image_size: side of the network's square input, or (height, width), in pixels.
        mean: mean for normalisation, for R, G and B in [0, 1].
        std: standard deviation for normalisation.
        hflip: probability of a horizontal flip of a training image, unless `augment` sets its own.
        batch_size: images per step on one device.
        eval_batch_size: images per evaluation step on one device; None means `batch_size`.
        num_workers: loader workers per device; None means CPU cores / devices, at most 8.
        seed: seed of shuffling and augmentation.
        render: where training images are augmented: `loader` (with Pillow), `device` (in batches, on the training
            device), or `auto`: on a GPU, otherwise in the loader. The views are the same.
        repeats: views of each image in an epoch, which contains 1 / repeats of the images (repeated augmentation).
        on_corrupt: `stop` at an image that cannot be read, or `skip` it and list it in `skipped_file`.
        skipped_file: file that lists the skipped images.
        label_maps: folder of a label-map store, for token labelling.
        on_missing_map: `error`, or `ignore`: all tokens of an image without a map are trained on its label.
        center_square_maps: see `LabelMapJoin`.
        root: folder of the data, which a config's source refers to as `${data.root}`; not used here.
        value_range: as `root`, for `${data.value_range}`; see `ImageFolder`.
        published_size: number of training images and of classes of a published data set, for `plan=true` on a machine
            without the data.

    Raises:
        ConfigError: a value is invalid; the message names its key.
    """

    def __init__(
        self,
        source: Source,
        augment: Augmentation,
        image_size: ImageSize | None = 224,
        mean: RGB | None = (0.485, 0.456, 0.406),
        std: Annotated[Sequence[Positive], Length(3)] | None = (0.229, 0.224, 0.225),
        hflip: Share = 0.5,
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt | None = None,
        seed: NonNegativeInt = 0,
        render: Literal["auto", "loader", "device"] = "auto",
        repeats: PositiveInt = 1,
        on_corrupt: Literal["stop", "skip"] = "stop",
        skipped_file: str | Path | None = None,
        label_maps: str | Path | None = None,
        on_missing_map: Literal["error", "ignore"] = "error",
        center_square_maps: Literal["placed", "stretched"] = "placed",
        root: str | None = None,
        value_range: Annotated[Sequence[float], Length(2)] | None = None,
        published_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if on_corrupt == "skip" and skipped_file is None:
            raise ConfigError("data.skipped_file: not set, but data.on_corrupt=skip has to list what it skips.")
        if image_size is None or mean is None or std is None:
            missing = "image_size" if image_size is None else "mean" if mean is None else "std"
            raise ConfigError(f"data.{missing}: not set; only src/eval.py can take it from a checkpoint.")
        self.source, self.augment, self.hflip, self.seed = source, augment, hflip, seed
        self.image_size, self.mean, self.std = height_width(image_size), tuple(mean), tuple(std)
        self.root, self.published_size = root, published_size
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.repeats, self.render = num_workers, repeats, render
        self.label_maps, self.on_missing_map, self.center_square_maps = label_maps, on_missing_map, center_square_maps
        self.skipped_file = Path(skipped_file) if on_corrupt == "skip" and skipped_file else None

    phases: Phases | None = None
    held_out_share: float | None = None
    caches_features = False

    def set_phases(self, phases: Phases) -> None:
        """Train in phases of image size and RandAugment magnitude; to be called before `setup`.

        Raises:
            ConfigError: training images get the evaluation transform, which has no phases.
        """
        if not self.augment.enabled:
            raise ConfigError("augment.enabled=false: phases change the training augmentation; set it to true.")
        self.phases = phases

    def set_probe(self, held_out: float, cache: bool) -> None:
        """Hold out a share of the training images, for a second validation loader; to be called before `setup`.

        Args:
            held_out: share of the training images.
            cache: serve features in place of images, once `fill_cache` has computed them.

        Raises:
            ConfigError: `cache`, and the training images are augmented.
        """
        if cache and self.augment.enabled:
            raise ConfigError("probe.cache=true: cached features are those of one view per image; set augment=none.")
        self.held_out_share, self.caches_features = held_out, cache

    @property
    def input(self) -> InputSpec:
        """Input of the network; the value range is known once the source has opened a split."""
        return InputSpec(
            self.image_size,
            self.mean,
            self.std,
            self.augment.eval_interpolation,
            self.augment.crop_pct,
            self.augment.crop_mode,
            getattr(self.source, "value_range", None),
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.source.classes)

    @property
    def provides(self) -> frozenset[str]:
        """What the data provides besides class labels: `label_maps` or nothing."""
        return frozenset() if self.label_maps is None else frozenset({"label_maps"})

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls it on one process."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the splits."""
        if stage in (None, "fit") and not hasattr(self, "train"):
            split = self.source.open("train")
            if self.held_out_share is not None:
                from vitrail.data.held_out import hold_out

                split, held_out = hold_out(split, self.held_out_share, self.seed, "probe.held_out")
                self.held_out = self._cached(self._evaluation_set(held_out))
            self.train = self._cached(self._training_set(split))
        if not hasattr(self, "val"):
            self.val = self._cached(self._evaluation_set(self.source.open("val")))

    def _cached(self, images: ViewDataset) -> "ViewDataset | CachedFeatures":
        if not self.caches_features:
            return images
        from vitrail.data.cached_features import CachedFeatures

        return CachedFeatures(images)

    def _evaluation_set(self, split: Split) -> ViewDataset:
        return ViewDataset(split, self.augment.evaluation(self.input), None, self.skipped_file, fill=False)

    def fill_cache(self, extract: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]) -> None:
        """Compute the features that the loaders serve in place of images; see `CachedFeatures.compute`."""
        from vitrail.data.cached_features import CachedFeatures

        for dataset in (self.train, self.held_out, self.val):
            assert isinstance(dataset, CachedFeatures)
            images = dataset.images
            options = self._loader_options(self._sampler(images, False), self.eval_batch_size, self._workers())
            dataset.compute(DataLoader(images, **{**options, "persistent_workers": False}), extract, gather)

    def _training_set(self, split: Split) -> ViewDataset:
        maps = None
        if self.label_maps is not None:
            self.augment.check_label_maps()
            store = LabelMapStore.open(self.label_maps)
            maps = LabelMapJoin(store, split.keys(), self.classes, self.on_missing_map, self.center_square_maps)
            maps.check(split.labels)
        return ViewDataset(split, self._training_transform(), self.seed, self.skipped_file, maps=maps)

    def _training_transform(self) -> Transform | TrainingTransform:
        if not self.augment.enabled:
            return self.augment.evaluation(self.input)
        augment = self.augment
        renderer = PILRenderer(self.input, augment.erase_mode, augment.operations)
        views: TrainingViews | PhasedViews = augment.views(self.input, self.hflip)
        if self.phases is not None:
            views = PhasedViews(self.phases, augment, self.input, self.hflip)
        return TrainingTransform(views, renderer, self.renders_on_device, augment.warp_label_maps)

    @property
    def renders_on_device(self) -> bool:
        """Whether training images are rendered on the training device.

        Raises:
            ConfigError: `render=device`, and the device cannot render the augmentation.
        """
        problem = self.augment.device_problem()
        if self.render == "device" and problem:
            raise ConfigError(f"{problem}, so that data.render=device is not possible; set data.render=auto.")
        on_gpu = self.trainer is not None and self._device.type == "cuda"
        return self.render == "device" or (self.render == "auto" and on_gpu and problem is None)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def train_dataloader(self) -> DataLoader[Item]:
        """Return a loader of shuffled and augmented images, without incomplete batches.

        Raises:
            ConfigError: there are fewer images than one global batch.
        """
        sampler = self._sampler(self.train, shuffle=True)
        if len(sampler) == 0:
            raise ConfigError(
                f"data.batch_size={self.batch_size} on {sampler.world_size} devices is more than "
                f"the {len(self.train)} training images."
            )
        options = self._loader_options(sampler, self.batch_size, self._loader_workers)
        if not self.renders_on_device:
            return DataLoader(self.train, **options)
        from vitrail.data.render import DeviceLoader, device_renderer

        renderer = device_renderer(self.input, self._device, self.augment.erase_mode, self.augment.operations)
        return DeviceLoader(renderer, self.train, **options)

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """Return a loader of all validation images in order, and one of the held-out training images, if there are."""
        loaders = [
            DataLoader(
                dataset,
                **self._loader_options(self._sampler(dataset, False), self.eval_batch_size, self._loader_workers),
            )
            for dataset in (self.val, *([] if self.held_out_share is None else [self.held_out]))
        ]
        return loaders[0] if self.held_out_share is None else loaders

    def _sampler(self, dataset: Sized, shuffle: bool) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        repeats = self.repeats if shuffle else 1
        return EpochSampler(len(dataset), self.seed, shuffle, rank, world_size, self.batch_size, repeats)

    @property
    def _loader_workers(self) -> int:
        return 0 if self.caches_features else self._workers()

    def _loader_options(self, sampler: EpochSampler, batch_size: int, workers: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "sampler": sampler,
            "num_workers": workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": workers > 0,
            "prefetch_factor": 4 if workers else None,
            "generator": torch.Generator().manual_seed(self.seed),  # keeps the loader off the global random stream
            "collate_fn": collate,
            "worker_init_fn": _ignore_signals,
        }

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        devices = self.trainer.num_devices if self.trainer else 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(8, cores // devices))


def _ignore_signals(_: int) -> None:
    """Ignore signals in loader workers; the main process handles them.

    A terminal or SLURM sends them to every process. After SIGTERM the main process has a minute to save and ends its
    workers itself; the timer ends a worker that hangs.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)

    def end_later(*_: Any) -> None:
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end_later)
