"""Random draws that depend only on a key, such as (seed, epoch, index), and not on earlier draws.

An image therefore gets the same view on any number of processes and loader workers, and after a resume.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator_seeds(*key: int) -> tuple[int, int, int]:
    """Return the seeds of Python's, NumPy's and PyTorch's generators for `key`."""
    seeds = np.random.SeedSequence(key).generate_state(3, np.uint64)
    return int(seeds[0]), int(seeds[1] >> 32), int(seeds[2] >> 1)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators with `key` inside the block, and restore them after it."""
    python, numpy, torch_seed = generator_seeds(*key)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def reseed(*key: int) -> None:
    """Seed PyTorch's generators of the CPU and of this process's device with `key`.

    `torch.manual_seed` would also record the stack for each kind of device that is not initialised, at every step.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(seed)
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed(seed)
