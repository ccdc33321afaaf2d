"""Pictures of what explains a network's predictions: where it looks, its classes of the patches, the tokens it keeps.

Shapes: B images of H x W pixels, S selections.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrail.models.explanations import Explanation
from vitrail.reporting.class_grids import (
    WHOLE,
    ClassGrid,
    Shares,
    class_grid,
    class_overlay,
    draw_legend,
    main_classes,
)
from vitrail.reporting.colours import class_colours
from vitrail.reporting.epoch_sheets import add_class_epoch, add_epoch
from vitrail.reporting.panels import PANEL, PanelSheet

TITLES = {
    "attention": "class token, last block",
    "rollout": "attention rollout",
    "gradient": "gradient",
    "tokens": "classes of the tokens",
    "kept": "kept tokens",
}


class Annotation(NamedTuple):
    """An image and its label map, which covers a box of it."""

    image: Image.Image
    grid: ClassGrid
    box: Shares = WHOLE


def explanation_sheet(
    images: NDArray[np.uint8],
    found: Explanation,
    names: Sequence[str],
    annotations: Sequence[Annotation | None] = (),
) -> Image.Image:
    """Draw one row per image: the image, and each of its maps over it; classes of tokens have a legend.

    Args:
        images: pixels (B, H, W, 3) of the network's input.
        found: maps of these images.
        names: class names.
        annotations: the annotator's label map of each image, drawn next to the network's classes of the tokens.
    """
    grids = [] if found.tokens is None else [class_grid(probabilities) for probabilities in found.tokens]
    annotated = [*annotations] if grids and any(annotations) else [None] * len(images)
    titles = ["image", *(TITLES[kind] for kind in found.heats)]
    titles += [TITLES["tokens"]] if grids else []
    titles += ["label map"] if any(annotated) else []
    stages = () if found.kept is None else found.kept.mean((0, 2, 3)).tolist()
    titles += [f"kept, {number}: {share:.0%}" for number, share in enumerate(stages, start=1)]
    both = [[grid, *([known.grid] if known else [])] for grid, known in zip(grids, annotated, strict=False)]
    listed = [main_classes(*shown) for shown in both]
    colours = class_colours((index for row in listed for index in row), len(names))
    sheet = PanelSheet(titles, len(images), legends=bool(grids))
    for row, image in enumerate(_panels(images)):
        panels = [image, *(heat_overlay(image, maps[row]) for maps in found.heats.values())]
        if grids:
            panels.append(class_overlay(image, grids[row], colours))
            draw_legend(sheet, row, grids[row], {index: colours[index] for index in listed[row]}, names)
        if known := annotated[row]:
            panels.append(class_overlay(known.image, known.grid, colours, known.box))
        elif any(annotated):
            panels.append(Image.new("RGB", image.size, "white"))
        panels += [] if found.kept is None else [_kept_overlay(image, mask) for mask in found.kept[row]]
        sheet.paste(row, panels)
    return sheet.image


def add_to_sheets(
    sheets: Mapping[str, Path], epoch: int, images: NDArray[np.uint8], found: Explanation, names: Sequence[str]
) -> None:
    """Add the maps of an epoch to the sheet of each kind, see `epoch_sheets`.

    The selections of tokens are one panel: the earlier a token is left out, the whiter it is.

    Args:
        sheets: PNG file of each kind.
        epoch: epoch, from 1.
        images: pixels (B, H, W, 3) of the network's input.
        found: maps of these images.
        names: class names.
    """
    panels = _panels(images)
    for kind, path in sheets.items():
        if kind == "tokens":
            assert found.tokens is not None
            grids = [class_grid(probabilities) for probabilities in found.tokens]
            add_class_epoch(path, epoch, panels, grids, names, f"{TITLES[kind]}; legend: epoch {epoch}")
            continue
        if kind == "kept":
            assert found.kept is not None
            maps = [_kept_overlay(*pair) for pair in zip(panels, found.kept.mean(1), strict=True)]
            heading = f"{TITLES[kind]}: the earlier one is left out, the whiter"
        else:
            maps = [heat_overlay(*pair) for pair in zip(panels, found.heats[kind], strict=True)]
            heading = TITLES[kind]
        add_epoch(path, epoch, panels, maps, heading)


def _panels(images: NDArray[np.uint8]) -> list[Image.Image]:
    return [Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.BICUBIC) for pixels in images]


def heat_overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Return an image with a map (rows, columns) over it, from the map's smallest value (blue) to its largest (red)."""
    import matplotlib  # only where it is used: a training imports this module

    heat = heat.detach().float().cpu()
    scaled = (heat - heat.min()) / (heat.max() - heat.min()).clamp_min(torch.finfo(torch.float32).tiny)
    grey = Image.fromarray((255 * scaled).round().byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    colours = matplotlib.colormaps["turbo"](np.asarray(grey))[..., :3]
    return Image.blend(image.convert("RGB"), Image.fromarray((255 * colours).round().astype(np.uint8)), 0.5)


def _kept_overlay(image: Image.Image, kept: Tensor) -> Image.Image:
    """Return an image that is almost white where a patch token is left out; `kept` is (rows, columns), 0 to 1."""
    left_out = Image.fromarray((215 * (1 - kept)).byte().cpu().numpy()).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, "white"), image, left_out)
