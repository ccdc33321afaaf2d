"""`--json FILE` of the benchmarks: writes the measured figures by name, for other programs."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json` to a benchmark's parser."""
    parser.add_argument("--json", type=Path, help="file to write the figures to: {name: number}")


def write_figures(path: Path | None, figures: Mapping[str, float]) -> None:
    """Write the figures to `path`, each rounded to six significant digits; None writes nothing."""
    if path is not None:
        path.write_text(json.dumps({name: float(f"{value:.6g}") for name, value in figures.items()}, indent=1) + "\n")
