"""Options that benchmarks share; `--json FILE` writes the measured figures by name, for other programs."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json` to a benchmark's parser."""
    parser.add_argument("--json", type=Path, help="file to write the figures to: {name: number}")


def parser_of_runs(description: str | None, out: Path, epochs: int, trained: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that trains, with `--out`, `--epochs` and `--json`.

    Args:
        description: the benchmark's description.
        out: default output folder.
        epochs: default number of epochs.
        trained: what is trained for so many epochs, for the help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), default=out, help="output folder")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"epochs of {trained}")
    add_json(parser)
    return parser


def write_figures(path: Path | None, figures: Mapping[str, float]) -> None:
    """Write the figures to `path`, each rounded to six significant digits; None writes nothing."""
    if path is not None:
        path.write_text(json.dumps({name: float(f"{value:.6g}") for name, value in figures.items()}, indent=1) + "\n")
