"""`scipy.signal`, imported when it is first used.

torchmetrics, which Lightning needs, imports it for audio metrics: a second of each start.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

_NAME = "scipy.signal"


class _Signal(ModuleType):
    """Stand-in that replaces itself by the module when an attribute is first read."""

    hamming = None
    """torchmetrics adds this window, which SciPy moved to `windows`, if the module has none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `inspect` asks every module for its file
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        module: Any = importlib.import_module(_NAME)
        module.hamming = module.windows.hamming
        return getattr(module, name)


def defer_scipy_signal() -> None:
    """Import `scipy.signal` only when one of its attributes is read."""
    sys.modules.setdefault(_NAME, _Signal(_NAME))
