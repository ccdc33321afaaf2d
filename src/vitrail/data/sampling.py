"""Order of the samples: a function of seed and epoch, the same on any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One sample to load: its index, what its augmentation depends on, and whether it only fills a batch."""

    sample: int
    epoch: int
    padding: bool
    repeat: int = 0  # number of the view in this epoch


class EpochSampler(Sampler[Draw]):
    """Sampler of the draws of one process.

    With `shuffle` (training), all processes together follow the order that a single process would; images that do not
    fill a global batch are omitted. Without it (validation), every image is drawn exactly once over all processes;
    processes with fewer images get extra draws, marked as padding, so that collective calls always match.

    Repeated augmentation (Hoffer et al., arXiv:1901.09335; with DeiT, arXiv:2012.12877): each image of the shuffled
    order comes several times in a row, in different views. The epoch has as many draws as there are images, so it
    contains only 1 / repeats of them. The copies are distributed over the processes in turn, as published.

    Args:
        length: number of images.
        seed: seed of the shuffling.
        shuffle: whether to shuffle.
        rank: rank of this process.
        world_size: number of processes.
        batch_size: images of one process in a step; used only to omit the remainder when shuffling.
        repeats: views of each image in an epoch; more than 1 only when shuffling.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        repeats: int = 1,
    ) -> None:
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        self.epoch = 0
        self._is_driven = False  # whether the caller sets the epoch
        self._has_begun = False
        self._done = (-1, 0)  # epoch, and its number of draws before the start
        together = batch_size * world_size if shuffle else world_size
        self.total = length // together * together if shuffle else -(-length // together) * together

    def set_epoch(self, epoch: int) -> None:
        """Use the order of `epoch`; Lightning calls it before each epoch. Without it, each pass is a new epoch."""
        self.epoch, self._is_driven = epoch, True

    def resume(self, epoch: int, done: int) -> None:
        """Start in `epoch` and skip the first `done` draws of this process in it."""
        self.epoch, self._done, self._is_driven = epoch, (epoch, done), True

    def __len__(self) -> int:
        return self.total // self.world_size

    def __iter__(self) -> Iterator[Draw]:
        if self._has_begun and not self._is_driven:
            self.epoch += 1
        self._has_begun = True
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.length, generator=generator).numpy()
        else:
            order = np.arange(self.length)
        done = self._done[1] if self.epoch == self._done[0] else 0
        for position in range(self.rank + done * self.world_size, self.total, self.world_size):
            padding = position >= self.length
            image, repeat = divmod(position % self.length, self.repeats)
            yield Draw(int(order[image]), self.epoch, padding, repeat)


def sample_of(count: int, size: int) -> NDArray[np.int64]:
    """Return up to `size` of `count` indices (N,), evenly spread and the same in every call."""
    return np.unique(np.linspace(0, count - 1, min(size, count)).round().astype(np.int64))
