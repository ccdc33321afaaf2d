"""How this program was called, and how a user calls the others."""

import shutil
import sys
from pathlib import Path

from vitrail_runtime.project import checkout

subcommand: list[str] = []
"""What stands between the program's file and Hydra's arguments: the name after `vitrail`, or nothing."""


def command_line() -> list[str]:
    """Return the command that starts this program again, up to its arguments."""
    return [sys.executable, str(Path(sys.argv[0]).absolute()), *subcommand]


def shown_command(name: str) -> str:
    """Return how a user calls a program from here: `vitrail eval`, or `python src/eval.py` in a checkout."""
    if subcommand:
        return f"vitrail {name}"
    python = "python" if shutil.which("python") == sys.executable else _near(Path(sys.executable))
    root = checkout()
    return f"{python} {_near(root / 'src' / f'{name}.py')}" if root else f"vitrail {name}"


def options() -> list[str]:
    """Return the options that this program was called with, such as `--allow names`, without the overrides."""
    arguments = sys.argv[1 + len(subcommand) :]
    return [argument for argument in arguments if argument.startswith("-") or "=" not in argument]


def _near(path: Path) -> str:
    """Return a path relative to the working directory if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
