"""Summary tables of a training and of the doctor, and readable class names."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text
from timm.data import ImageNetInfo

from vitrail.data.label_maps.checks import Finding
from vitrail_runtime.invocation import shown_command
from vitrail_runtime.tables import PlainTable


def training_report(results: Mapping[str, Any], directory: Path) -> Group:
    """Return a summary of a training: results, files and suggested next commands."""
    table = PlainTable(title="Training finished", show_header=False, title_style="bold")
    for metric, name in (("val/top1", "best top-1"), ("val/top5", "best top-5"), ("val/mIoU", "best mIoU")):
        if metric in results:
            table.add_row(name, _both(results, metric))
    table.add_row("training", f"{results['epochs']} epochs in {results['seconds']:.0f} s")
    table.add_row("speed", f"{results['images_per_second']:,.0f} images/s")
    if results.get("skipped_images"):
        table.add_row("skipped images", f"{results['skipped_images']}, listed in skipped.txt")
    run, train = near(directory), shown_command("train")
    own = "data=imagefolder data.root=/path/with/train/and/val model=deit_small"
    if "val/mIoU" in results:
        own = "experiment=segmentation data=segmentation_folder data.root=/path/with/images/and/masks"
    # Plain lines rather than table cells, so that paths and commands can be copied without line breaks.
    lines = [
        ("run directory", run),
        ("checkpoint", f"{run}/checkpoints/best.ckpt"),
        ("config", f"{run}/config.yaml"),
        ("metrics", f"{run}/metrics.csv"),
        ("evaluate", f"{shown_command('eval')} ckpt={run}"),
        ("train longer", f"{train} resume={run} epochs={2 * results['epochs']}"),
        ("your images", f"{train} {own}"),
    ]
    return Group(table, *(Text(f"{name:<13} {value}", no_wrap=True, overflow="ignore") for name, value in lines))


def pack_report(out: Path, manifest: Mapping[str, Any], stored: str) -> Group:
    """Return a summary of a pack: images, files, sizes and skipped images of each split, and the next commands.

    Args:
        out: folder of the pack.
        manifest: the pack's manifest.
        stored: how the stored pixels differ from the original files; empty if they do not.
    """
    table = PlainTable(title="Pack finished", show_header=False, title_style="bold")
    skipped = 0
    for name, split in manifest["splits"].items():
        files, data_files = split["files"], split["data_files"]
        data, tables = (sum(file["bytes"] for file in some) for some in (files[:data_files], files[data_files:]))
        mean = data / split["images"]
        sizes = f"{size_words(data)} in {data_files} file{'s' * (data_files > 1)}, {size_words(mean)} per image"
        table.add_row(name, f"{split['images']:,} images, {sizes}, {size_words(tables)} of tables")
        skipped += split["skipped"]
    table.add_row("classes", f"{len(manifest['begun']['classes']):,}")
    table.add_row("pixels", stored or "those of the original files")
    if skipped:
        table.add_row("skipped", f"{skipped} unreadable image{'s' * (skipped > 1)}, listed in {near(out)}/skipped.txt")
    program = "train" if "train" in manifest["splits"] else "eval ckpt=<run>"
    use = f"{shown_command(program.split()[0])}{program.removeprefix('train').removeprefix('eval')} data=packed"
    lines = [
        ("use it", f"{use} data.root={out}"),
        ("check it", f"{shown_command('doctor')} data=packed data.root={out}"),
    ]
    return Group(table, *(Text(f"{name:<13} {value}", no_wrap=True, overflow="ignore") for name, value in lines))


def counted(number: int, name: str) -> str:
    """Return a number with a noun: `1 image`, `2 images`."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def size_words(size: float) -> str:
    """Return a size in bytes in words: GiB, MiB or KiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def findings_table(findings: Sequence[Finding]) -> PlainTable:
    """Return a table of the doctor's findings and advice."""
    wrong = sum(finding.level == "error" for finding in findings)
    table = PlainTable(
        title=f"{wrong} problem{'s' * (wrong > 1)} found" if wrong else "No problems found", title_style="bold"
    )
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        table.add_row(finding.check, Text(finding.level, colours[finding.level]), finding.text, finding.advice)
    return table


def _both(results: Mapping[str, Any], metric: str) -> str:
    text = f"{results[metric]:.2f} % with the raw weights"
    if results.get(f"{metric}_ema") is not None:
        text += f", {results[f'{metric}_ema']:.2f} % with the EMA weights"
    return text


def near(path: Path) -> str:
    """Return a path relative to the working directory if it lies below it, otherwise unchanged."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def describe(name: str) -> str:
    """Return a readable class name: the first lemma for ImageNet's WordNet ids, other names unchanged."""
    if len(name) == 9 and name[0] == "n" and name[1:].isdigit():
        return _wordnet().label_name_to_description(name).split(",")[0]
    return name


@cache
def _wordnet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-22k")


def shortened(name: str, length: int) -> str:
    """Return a name with at most `length` characters; a longer one ends with an ellipsis."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"
