"""`reproduce=<run>`: repeat a finished training from its saved config, and compare the metrics."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.text import Text

from vitrail.checkpoints.classes import require_same
from vitrail.checkpoints.reading import origin_of, read_checkpoint
from vitrail.errors import ConfigError
from vitrail.runs.config import moved, plain, restore
from vitrail.runs.directory import RunDirectory, versions
from vitrail_runtime.tables import PlainTable

log = logging.getLogger(__name__)

_IGNORED = ("epoch", "step", "speed/")  # columns that are not results


def recorded_config(config: DictConfig, defaults: DictConfig, run: Path) -> DictConfig:
    """Return the config to repeat the run `config.reproduce` in the directory `run`, and warn about changed versions.

    Raises:
        ConfigError: there is no such run.
    """
    source = Path(config.reproduce).expanduser().absolute()
    if not (source / "config.yaml").is_file():
        raise ConfigError(f"reproduce={config.reproduce}: not a run directory (no config.yaml).")
    if not (source / "metrics.csv").is_file():
        raise ConfigError(f"reproduce={config.reproduce}: no metrics.csv to compare with.")
    saved = plain(restore(config, defaults, source))
    for change in changes(OmegaConf.to_container(OmegaConf.load(source / "versions.yaml")), versions()):
        log.warning("changed since that run: %s", change)
    return OmegaConf.create({**moved(saved, run), "resume": None, "reproduce": str(source)})


def require_recorded_classes(reproduce: str, classes: Sequence[str]) -> None:
    """Require that the run to reproduce was trained on the data's current classes.

    Raises:
        ConfigError: names or order differ.
    """
    run = RunDirectory(Path(reproduce))
    files = [file for file in (run.last, run.best) if file.is_file()]
    if files:
        recorded = origin_of(read_checkpoint(files[0], values=False, key="reproduce"), files[0]).classes
        require_same(recorded, classes, f"reproduce={reproduce}", "undo the change of the class folders")


def changes(before: Any, now: dict[str, Any]) -> list[str]:
    """List the differences between two `versions.yaml`, one line each."""
    found = [
        f"{key} {before.get(key)}, now {now[key]}"
        for key in ("commit", "python", "platform")
        if before.get(key) != now[key]
    ]
    packages, others = before.get("packages", {}), now["packages"]
    found += [
        f"{name} {packages.get(name, 'not installed')}, now {others.get(name, 'not installed')}"
        for name in sorted({*packages, *others})
        if packages.get(name) != others.get(name)
    ]
    return found


def comparison(source: Path, again: Path) -> tuple[Group, bool]:
    """Compare the metrics of two runs: a table of the largest differences, and whether there are none."""
    first, second = (_rows(folder / "metrics.csv") for folder in (source, again))
    names = sorted({name for row in first for name in row if not name.startswith(_IGNORED)})
    table = PlainTable(title=f"Compared with {source.name}", title_style="bold")
    for column in ("metric", "then", "now", "largest difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    same = len(first) == len(second)
    for name in names:
        pairs = [(float(a[name]), float(b.get(name) or "nan")) for a, b in zip(first, second, strict=False) if a[name]]
        if not pairs:
            continue
        differences = [0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) for a, b in pairs]
        same &= not any(differences)
        largest = math.nan if any(math.isnan(value) for value in differences) else max(differences)
        table.add_row(name, f"{pairs[-1][0]:g}", f"{pairs[-1][1]:g}", f"{largest:.2g}")
    if len(first) != len(second):
        verdict = f"Not identical: {len(first)} epochs then, {len(second)} now."
    else:
        verdict = "Identical, to the last digit written." if same else "Not identical; see the table."
    return Group(table, Text(verdict, style="bold")), same


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
