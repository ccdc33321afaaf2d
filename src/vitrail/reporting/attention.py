"""Pictures of where a network looks.

Shapes: B images of H x W pixels.
"""

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PANEL, _GAP, _HEAD = 168, 6, 22  # pixels
_TITLES = ("image", "class token, last block", "rollout")


def attention_sheet(images: NDArray[np.uint8], maps: list[Tensor]) -> Image.Image:
    """Draw one row per image: the image, and each of its maps over it.

    Args:
        images: pixels (B, H, W, 3).
        maps: class attention and rollout, each (B, rows, columns).
    """
    step = _PANEL + _GAP
    sheet = Image.new("RGB", (_GAP + (1 + len(maps)) * step, _HEAD + len(images) * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, title in enumerate(_TITLES[: 1 + len(maps)]):
        draw.text((_GAP + number * step, 4), title, "black", font)
    for row, pixels in enumerate(images):
        image = Image.fromarray(pixels).resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
        panels = [image, *(heat_overlay(image, each[row]) for each in maps)]
        for number, panel in enumerate(panels):
            sheet.paste(panel, (_GAP + number * step, _HEAD + row * step))
    return sheet


def heat_overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Return an image with a map (rows, columns) over it, from the map's smallest value (blue) to its largest (red)."""
    heat = heat.detach().float().cpu()
    scaled = (heat - heat.min()) / (heat.max() - heat.min()).clamp_min(torch.finfo(torch.float32).tiny)
    grey = Image.fromarray((255 * scaled).round().byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    colours = matplotlib.colormaps["turbo"](np.asarray(grey))[..., :3]
    return Image.blend(image.convert("RGB"), Image.fromarray((255 * colours).round().astype(np.uint8)), 0.5)
