"""Summary of label maps in the terminal."""

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from vitrail.data.label_maps import LabelMapStore
from vitrail.data.label_maps.checks import Agreement
from vitrail.reporting.tables import describe
from vitrail_runtime.invocation import shown_command
from vitrail_runtime.tables import PlainTable


def annotation_report(store: LabelMapStore, agreement: Agreement | None, classes: Sequence[str]) -> Group:
    """Return a summary of label maps: contents, agreement with the labels, and the command to train with them."""
    table = PlainTable(title=f"Label maps of {len(store):,} images", show_header=False, title_style="bold")
    table.add_row("annotator", str(store.about.get("annotator")))
    table.add_row("cells", f"{store.grid[0]} x {store.grid[1]}, {store.about.get('coverage')}")
    table.add_row("stored", f"top {store.top_k} of {store.num_classes} classes")
    where = Text(f"{'label maps':<13} {store.path}", no_wrap=True, overflow="ignore")
    if agreement is None:
        table.add_row("agreement", "unknown: the annotator's classes are not the data's")
        return Group(table, where)
    table.add_row("pooled top-1", f"{agreement.top1:.2%} predict the true class")
    table.add_row("cells", f"{agreement.cells_without:.2%} lack the true class")
    worst = PlainTable(title="Classes with the lowest agreement", title_style="bold")
    for name in ("class", "images", "agree", "mostly predicted"):
        worst.add_column(name, justify="left" if name in ("class", "mostly predicted") else "right")
    for label, images, share, predicted in agreement.worst(10):
        worst.add_row(describe(classes[label]), str(images), f"{share:.1%}", describe(classes[predicted]))
    recipe = "model=lvvit_s objective=token_labeling augment=lvvit"
    use = f"{shown_command('train')} data=... {recipe} data.label_maps={store.path}"
    return Group(table, worst, where, Text(f"{'train':<13} {use}", no_wrap=True, overflow="ignore"))
