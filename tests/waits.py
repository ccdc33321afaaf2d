"""Count what makes the host wait for a device: reads of values, copies from and to the host, and collectives."""

import sys
from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.data.label_maps.targets import _pooling
from vitrail.data.transfer import to_device

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
_MADE = (torch.tensor, torch.as_tensor, torch.asarray)
_READS = (Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__)
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__)


class Waits(TorchDispatchMode):
    """Mode that counts operators that read values from a device, copies from and to the host, and collectives.

    On a CPU nothing waits, but the operators are the same as on a GPU. Tensors that are made of Python's or NumPy's
    numbers within the mode count as the host's, and others by their attribute `is_of_host`: reading them is free, and
    `to_device` copies them without waiting. Label maps are checked (`_pooling`) on a CPU only.
    """

    def __init__(self):
        super().__init__()
        self.found, self.copies = Counter(), _Copies(self)

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = str(func).split(".")[:2]
        is_free = name == "_local_scalar_dense" and is_of_host(args[0])
        if namespace.lstrip("_").startswith("c10d") or (_plain(name) in map(_plain, _WAITS) and not is_free):
            self.found[str(func)] += 1
        if name == "index" and any(index is not None and index.dtype.itemsize == 1 for index in args[1]):
            self.found["index by a mask"] += 1
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Mode that counts copies from and to the host in `waits.found`."""

    def __init__(self, waits):
        super().__init__()
        self.waits, self.from_numpy = waits, torch.from_numpy

    def __enter__(self):
        torch.from_numpy = lambda array: torch.as_tensor(array)  # modes do not see `from_numpy`
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.from_numpy = self.from_numpy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _MADE:
            if not isinstance(args[0], Tensor):
                if kwargs.get("device") is not None:
                    self._count("a tensor made on the host")
                result.is_of_host = True
        elif func is Tensor.new_tensor:
            self._count("a tensor made on the host")
        elif func is Tensor.to and is_of_host(args[0]) and torch._C._nn._parse_to(*args[1:], **kwargs)[0] is not None:
            if not _is_called_by(to_device):
                self._count("a tensor of the host to the device")
            return result.detach()
        elif func is Tensor.copy_ and is_of_host(args[1]):
            self._count("a tensor of the host to the device")
        elif (func in _READS and not is_of_host(args[0])) or (func is Tensor.to and "cpu" in args[1:]):
            if not _is_called_by(_pooling):
                self._count(func.__name__)
        elif func in _INDEXED and _has_host_index(args[1]):
            self._count("an index of the host")
        return result

    def _count(self, what):
        self.waits.found[what] += 1


def is_of_host(tensor):
    """Return whether a tensor is known to lie in the host's memory."""
    return getattr(tensor, "is_of_host", False)


def _has_host_index(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) or is_of_host(part) for part in parts)


def _is_called_by(function):
    """Return whether a function called the operator that the mode is looking at."""
    return sys._getframe(2).f_code is function.__code__


def _plain(name):
    return name.removeprefix("_").removesuffix("_")
