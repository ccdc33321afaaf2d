"""Random draws that are a function of what they are for, never of what was drawn before.

The same image gets the same view on one process or on eight, with any number of loader workers, and after a resume.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make Python's, NumPy's and PyTorch's CPU draws inside the block a function of `key`; leave no trace outside."""
    seeds = np.random.SeedSequence(key).generate_state(3, np.uint64)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1] >> 32))
    torch.default_generator.manual_seed(int(seeds[2] >> 1))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def reseed(*key: int) -> None:
    """Make PyTorch's draws from here on, on every device, a function of `key`."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
