"""Names that a package imports at their first use (PEP 562), so that a program loads only what it uses.

Python and the type checkers read the same list, which is written once:

    if TYPE_CHECKING:
        from vitrail.training.ema import EMA
    else:
        __getattr__, __dir__ = lazy_names(__name__)
"""

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package, or of a module, that imports some names at their first use.

    The names are those that it imports below `if TYPE_CHECKING:`. The modules of a package are imported in the same way
    when they are read as attributes.

    Args:
        package: `__name__` of the caller, which is being imported.
    """
    module = sys.modules[package]

    @functools.cache
    def sources() -> dict[str, str]:
        """Return the module of each name."""
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        blocks = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
        return {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name in sources():
            value = getattr(importlib.import_module(sources()[name]), name)
            setattr(module, name, value)
            return value
        is_package = "__path__" in vars(module)
        if is_package and not name.startswith("__") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(module), *sources()})
