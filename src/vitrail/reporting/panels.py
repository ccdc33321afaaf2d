"""Sheets of square panels: one row per image, with titles above, and optionally a caption and a legend per row."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vitrail.reporting.colours import RGB

PANEL, GAP = 168, 6  # pixels
LEGEND, LEGEND_LINE = 236, 22  # width of a legend, and height of its lines
_TITLE, _HEADING, _CAPTION = 22, 18, 18


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
        self._top = _TITLE + (_HEADING if heading else 0)
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

    def legend(self, row: int, entries: Sequence[tuple[RGB, str]]) -> None:
        """Draw the legend of a row on the right: a colour and a text per line."""
        draw_legend_lines(self.draw, (self.image.width - LEGEND, self._top + row * self._step), entries)


def cut_panels(sheet: Image.Image, heading: bool = False) -> list[list[Image.Image]]:
    """Return the panels of a sheet without captions, column by column; room for legends is one more column."""
    top = _TITLE + (_HEADING if heading else 0)
    lefts, tops = range(GAP, sheet.width - PANEL, PANEL + GAP), range(top, sheet.height - PANEL, PANEL + GAP)
    return [[sheet.crop((left, upper, left + PANEL, upper + PANEL)) for upper in tops] for left in lefts]


def draw_legend_lines(draw: ImageDraw.ImageDraw, corner: tuple[int, int], entries: Sequence[tuple[RGB, str]]) -> None:
    """Draw a legend with its upper left corner at (x, y), in pixels: a colour and a text per line of `LEGEND_LINE`."""
    x, y = corner
    for number, (colour, text) in enumerate(entries):
        top = y + LEGEND_LINE * number
        draw.rectangle((x, top + 3, x + 12, top + 15), fill=colour)
        draw.text((x + 18, top + 2), text, "black", ImageFont.load_default(size=12))
