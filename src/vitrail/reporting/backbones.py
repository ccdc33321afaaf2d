"""Tables of backbones: cost, published accuracy, released weights."""

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
from rich import box
from rich.tree import Tree
from torch import nn

from vitrail.models.cost import Cost
from vitrail.models.licences import licence_of
from vitrail_runtime.tables import PlainTable

_PUBLISHED = Path(__file__).with_name("published.csv")  # a link to results/published.csv in a checkout


class Published(NamedTuple):
    """A published accuracy on ImageNet-1k, in percent."""

    side: int
    top1: float
    arxiv: str


class BackboneRow(NamedTuple):
    """A row of the table of backbones."""

    name: str
    size: tuple[int, ...]
    cost: Cost
    published: list[Published]
    weights: list[str]
    licences: list[str]
    """Licence of each of the weights, in the same order."""

    @property
    def family(self) -> str:
        """Name without sizes, by which the table is sorted."""
        return re.split(r"_(tiny|small|medium|base|large|huge|gi|nano|t_\d|\d|[tsml]$)", self.name)[0]


@cache
def _published() -> dict[str, list[Published]]:
    table: dict[str, list[Published]] = {}
    with _PUBLISHED.open(newline="") as file:
        for row in csv.DictReader(file):
            entry = Published(int(row["img_size"]), float(row["top1"]), row["arxiv"])
            table.setdefault(row["model"], []).append(entry)
    return table


def published(name: str) -> list[Published]:
    """Return the published top-1 accuracies of timm's backbone `name`, lowest resolution first."""
    return _published().get(name, [])


def published_names() -> list[str]:
    """Return the backbones with a published accuracy."""
    return list(_published())


def released_weights(name: str) -> list[str]:
    """Return the tags of the weights that `model.pretrained=true model.name=<name>.<tag>` downloads."""
    return [full.partition(".")[2] or "yes" for full in timm.list_pretrained(f"{name}.*")]


def licences(name: str, tags: Sequence[str]) -> list[str]:
    """Return the licence of each of the released weights of timm's backbone `name`."""
    return [licence_of(name if tag == "yes" else f"{name}.{tag}") or "unknown" for tag in tags]


def _licence_line(rows: Sequence[BackboneRow]) -> str:
    """Return the licences of all released weights, with the families that use them."""
    families: dict[str, set[str]] = {}
    for row in rows:
        for licence in row.licences:
            families.setdefault(licence, set()).add(row.family)
    most = max(families, key=lambda licence: len(families[licence]), default="")
    others = [f"{licence} ({', '.join(sorted(families[licence]))})" for licence in sorted(families) if licence != most]
    return f"licence of the weights: {', '.join([most or 'none released', *others])}"


def backbone_table(rows: Sequence[BackboneRow]) -> PlainTable:
    """Return a table with one row per backbone, narrow enough for 80 columns."""
    table = PlainTable(
        title="Backbones: model=timm model.name=<name>, or model=<family>",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("model", "px", "M par.", "G MACs", "tok.", "top-1 % (at)", "files"):
        text = column in ("model", "top-1 % (at)")
        wrap = column == "top-1 % (at)"
        table.add_column(column, justify="left" if text else "right", no_wrap=not wrap, min_width=10 if wrap else None)
    previous = None
    for row in rows:
        if previous not in (None, row.family):
            table.add_section()
        previous = row.family
        table.add_row(
            row.name,
            str(row.size[0]) if len(set(row.size)) == 1 else "x".join(str(side) for side in row.size),
            f"{row.cost.parameters / 1e6:.1f}",
            f"{row.cost.macs / 1e9:.2f}",
            str(row.cost.tokens or ""),
            "\n".join(f"{entry.top1} ({entry.side})" for entry in row.published),
            str(len(row.weights) or ""),
        )
    table.caption = (
        "MACs per image of this size; published top-1 on ImageNet-1k; number of released weights files;"
        f" {_licence_line(rows)}"
    )
    return table


def weights_line(row: BackboneRow) -> str:
    """Return the paper, and the names and licences of all released weights."""
    weights = zip(row.weights, row.licences, strict=True)
    names = ", ".join(f"{row.name}.{tag} (licence: {licence})" for tag, licence in weights)
    papers = published(row.name)
    paper = f"Paper: arXiv:{papers[0].arxiv}\n" if papers else ""
    return f"{paper}Released weights (model.pretrained=true model.name=...): {names or 'none'}"


def layer_tree(model: nn.Module, depth: int) -> Tree:
    """Return a tree of a backbone's layers down to `depth`, with their numbers of parameters."""
    tree = Tree(f"[bold]{type(model).__name__}[/bold]")
    _grow(tree, model, depth)
    return tree


def _grow(tree: Tree, module: nn.Module, depth: int) -> None:
    for name, child in module.named_children():
        parameters = sum(parameter.numel() for parameter in child.parameters())
        if not parameters:
            continue
        detail = f" {child.extra_repr()}" if not list(child.children()) and child.extra_repr() else ""
        branch = tree.add(f"{name} [dim]{type(child).__name__}{detail}[/dim] {parameters:,}", highlight=True)
        if depth > 1:
            _grow(branch, child, depth - 1)


def speed_table(rows: Sequence[Mapping[str, Any]], peak: float, ratios: Sequence[float]) -> PlainTable:
    """Return a table of speed and memory of one or two backbones; for two, with the ratios of the first to the second.

    Args:
        rows: rows of `vitrail.commands.benchmark`.
        peak: operations per second of the device in large matrix products.
        ratios: time ratio of each round; empty for one backbone.
    """
    first = rows[0]
    title = f"{first['mode']}, batch {first['batch_size']}, {first['image']}, {first['precision']}, {first['device']}"
    table = PlainTable(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("model", "ms", "images/s", "peak MB", "G MACs", "of peak"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        name = row["model"] + (f" (compiled: {row['compile']})" if row["compile"] else "")
        known = row["gmacs"] > 0
        table.add_row(
            name,
            f"{row['ms']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{row['gmacs']:.2f}" if known else "",
            f"{100 * row['share_of_peak']:.0f} %" if known else "",
        )
    if ratios:
        time, memory = statistics.median(ratios), first["peak_mb"] / rows[1]["peak_mb"]
        table.add_section()
        table.add_row("first / second", f"{time:.3f}", "", f"{memory:.3f}", "", "")
        table.caption = f"time ratio: median of {len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f}"
    peak_line = f"peak: {peak / 1e9:,.0f} GFLOP/s in large matrix products on this device"
    table.caption = f"{table.caption}; {peak_line}" if table.caption else peak_line
    return table
