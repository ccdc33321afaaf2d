"""Count what makes the host wait for a device: reads of values, copies to the host, and collectives."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")


class Waits(TorchDispatchMode):
    """Mode that counts operators that read values from a device, and collectives.

    On a CPU nothing waits, but the operators are the same as on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = str(func).split(".")[:2]
        if namespace.startswith("c10d") or name.removeprefix("_").removesuffix("_") in map(_plain, _WAITS):
            self.found[str(func)] += 1
        if name == "index" and any(index is not None and index.dtype.itemsize == 1 for index in args[1]):
            self.found["index by a mask"] += 1
        return func(*args, **(kwargs or {}))


def _plain(name):
    return name.removeprefix("_").removesuffix("_")
