"""Packages that others import at each start and vitrail rarely uses: imported when they are first used.

torchmetrics, which Lightning needs, imports `scipy.signal` for audio metrics: a second. timm imports wandb for a
summary that vitrail does not use: a third of a second.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stand-in that replaces itself by the module when an attribute is first read."""

    def __getattr__(self, name: str) -> Any:
        # `inspect` asks every module for its file.
        if name.startswith("__") and name not in ("__path__", "__version__"):
            raise AttributeError(name)
        return getattr(self._load(), name)

    def _load(self) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


class _Signal(_Deferred):
    """Stand-in of `scipy.signal`."""

    hamming = None
    """torchmetrics adds this window, which SciPy moved to `windows`, if the module has none."""

    def _load(self) -> Any:
        module = super()._load()
        module.hamming = module.windows.hamming
        return module


def defer_imports() -> None:
    """Import `scipy.signal` and wandb only when one of their attributes is read."""
    sys.modules.setdefault("scipy.signal", _Signal("scipy.signal"))
    if "wandb" not in sys.modules and (spec := importlib.util.find_spec("wandb")) is not None:
        stand_in = _Deferred("wandb")
        stand_in.__spec__ = spec  # which others ask for, to see whether wandb is installed
        sys.modules["wandb"] = stand_in
