"""vitrail trains vision transformers; importing it registers every backbone with timm."""

from typing import Any

from vitrail import models

__version__ = "0.2.0"
__all__ = ["__version__", "load_run", "models"]


def __getattr__(name: str) -> Any:
    """Import `load_run` when it is asked for: it needs Lightning and Hydra, which backbones alone do not."""
    if name == "load_run":
        from vitrail.runs.trained import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
