"""Tables that end a training or an examination, and classes in words."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from timm.data import ImageNetInfo

from vitrail.data.label_maps.checks import Finding


def training_report(results: Mapping[str, Any], directory: Path) -> Group:
    """What a training gave, where its files lie, and what can be done next."""
    table = Table(title="Training finished", show_header=False, title_style="bold")
    table.add_row("best top-1", _both(results, "val/top1"))
    table.add_row("best top-5", _both(results, "val/top5"))
    table.add_row("training", f"{results['epochs']} epochs in {results['seconds']:.0f} s")
    table.add_row("speed", f"{results['images_per_second']:,.0f} images/s")
    if results.get("skipped_images"):
        table.add_row("skipped", f"{results['skipped_images']} unreadable images, listed in skipped.txt")
    run, scripts = near(directory), near(Path(sys.argv[0]).resolve().parent)
    program = f"{_interpreter()} {scripts}"
    # Lines of their own rather than table cells: paths and commands must not be broken when copied.
    lines = [
        ("run directory", run),
        ("checkpoint", f"{run}/checkpoints/best.ckpt"),
        ("config", f"{run}/config.yaml"),
        ("metrics", f"{run}/metrics.csv"),
        ("evaluate", f"{program}/eval.py ckpt={run}"),
        ("train on", f"{program}/train.py resume={run} epochs={2 * results['epochs']}"),
        ("your images", f"{program}/train.py data=imagefolder data.root=/path/with/train/and/val model=deit_small"),
    ]
    return Group(table, *(Text(f"{name:<13} {value}", no_wrap=True, overflow="ignore") for name, value in lines))


def findings_table(findings: Sequence[Finding]) -> Table:
    """What a doctor found, and what to do."""
    wrong = sum(finding.level == "error" for finding in findings)
    table = Table(
        title=f"{wrong} problem{'s' * (wrong > 1)} found" if wrong else "No problems found", title_style="bold"
    )
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        table.add_row(finding.check, f"[{colours[finding.level]}]{finding.level}", finding.text, finding.advice)
    return table


def _both(results: Mapping[str, Any], metric: str) -> str:
    text = f"{results[metric]:.2f} % with the raw weights"
    if results.get(f"{metric}_ema") is not None:
        text += f", {results[f'{metric}_ema']:.2f} % with their EMA"
    return text


def near(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _interpreter() -> str:
    """How to call this Python from the working directory: `python` only where that is the same one."""
    return "python" if shutil.which("python") == sys.executable else near(Path(sys.executable))


def describe(name: str) -> str:
    """A class in words: WordNet ids of ImageNet by their first lemma, other names as they are."""
    if len(name) == 9 and name[0] == "n" and name[1:].isdigit():
        return _wordnet().label_name_to_description(name).split(",")[0]
    return name


@cache
def _wordnet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-22k")
