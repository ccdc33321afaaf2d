"""Tables without markup in their cells: class names and paths may contain brackets."""

from typing import Any

from rich.table import Table
from rich.text import Text


class PlainTable(Table):
    """A table of rich that takes text in titles, headers and cells literally; for styles, pass a `Text`."""

    def __init__(self, *headers: Any, title: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=None if title is None else Text(title), **options)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        """Add a column, see `rich.table.Table.add_column`."""
        super().add_column(_literal(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row, see `rich.table.Table.add_row`."""
        super().add_row(*map(_literal, cells), **options)


def _literal(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell
