"""Sheets of square panels: one row per image, with titles above, and optionally a caption and a legend per row."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PANEL, GAP = 168, 6  # pixels
_TITLE, _CAPTION, LEGEND = 22, 18, 236


class PanelSheet:
    """A white sheet to paste panels on.

    Args:
        titles: one for each column.
        rows: number of rows.
        heading: line above the titles; empty for none.
        captions: whether there is a line of text below each row.
        legends: whether each row has room for a legend on the right.
    """

    def __init__(
        self, titles: Sequence[str], rows: int, heading: str = "", captions: bool = False, legends: bool = False
    ) -> None:
        self._top = _TITLE + (18 if heading else 0)
        self._step = PANEL + (_CAPTION if captions else GAP)
        width = GAP + len(titles) * (PANEL + GAP) + (LEGEND if legends else 0)
        self.image = Image.new("RGB", (width, self._top + rows * self._step), "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(size=12)
        if heading:
            self.draw.text((GAP, 4), heading, "black", self.font)
        for number, title in enumerate(titles):
            self.draw.text((GAP + number * (PANEL + GAP), self._top - 18), title, "black", self.font)

    def paste(self, row: int, panels: Sequence[Image.Image], caption: str = "") -> None:
        """Paste the panels of a row, each resized to a square, and its caption."""
        top = self._top + row * self._step
        for number, panel in enumerate(panels):
            square = panel.resize((PANEL, PANEL), Image.Resampling.BOX)
            self.image.paste(square, (GAP + number * (PANEL + GAP), top))
        if caption:
            self.draw.text((GAP, top + PANEL + 1), caption, "black", self.font)

    def legend_corner(self, row: int) -> tuple[int, int]:
        """Return the upper left corner (x, y) of a row's legend, in pixels."""
        return self.image.width - LEGEND, self._top + row * self._step
