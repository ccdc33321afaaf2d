"""Which sample comes when: a function of (seed, epoch), on any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """An order for one sample: its index, what its augmentation depends on, whether it only fills a batch."""

    sample: int
    epoch: int
    padding: bool
    repeat: int = 0  # which of its views in this epoch


class EpochSampler(Sampler[Draw]):
    """The draws of one process.

    Shuffled (training): the order of all processes together is the one that a single process would see; what does not
    fill a global batch is left out. In order (validation): every sample exactly once over all processes; draws that
    only make their numbers equal are marked as padding, so that collective calls always pair up.

    Repeated augmentation (Hoffer et al., arXiv:1901.09335; with DeiT, arXiv:2012.12877): each image of the shuffled
    order comes several times in a row, in different views, and the epoch ends after as many draws as there are images,
    so that it sees only 1 / repeats of them. The copies are dealt out to the processes in turn, as published.

    Args:
        length: number of samples.
        seed: of the shuffle.
        shuffle: for training.
        rank: this process.
        world_size: number of processes.
        batch_size: samples of one process in a step; only used to leave out the tail when shuffling.
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
        self._is_driven = False  # somebody sets the epoch
        self._has_begun = False
        self._done = (-1, 0)  # an epoch, and how many of its draws came before
        together = batch_size * world_size if shuffle else world_size
        self.total = length // together * together if shuffle else -(-length // together) * together

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; Lightning calls it before each epoch. Without it, each pass is a new epoch."""
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
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        done = self._done[1] if self.epoch == self._done[0] else 0
        for position in range(self.rank + done * self.world_size, self.total, self.world_size):
            padding = position >= self.length
            image, repeat = divmod(position % self.length, self.repeats)
            yield Draw(int(order[image]), self.epoch, padding, repeat)
