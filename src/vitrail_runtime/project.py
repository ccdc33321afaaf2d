"""Paths of the project: the checkout, if there is one, and the config files."""

from pathlib import Path

CONF = Path(__file__).resolve().parent / "conf"
"""The config files: a link to the checkout's `conf/`, and a copy of it in an installed package."""


def checkout() -> Path | None:
    """Return the root of the checkout that contains this package; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "vitrail_runtime").is_dir() else None


def home() -> Path:
    """Return the folder of `logs/`, `data/` and `.env`: the checkout, or the current folder if there is none."""
    return checkout() or Path.cwd()
