"""Pictures of where a network looks.

Shapes: B images of H x W pixels.
"""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.models.attention_maps import attention_weights, maps_of, rollout
from vitrail.reporting.pictures import denormalise, log_picture
from vitrail.training import ImageClassifier
from vitrail_runtime.checking import PositiveInt, checked

log = logging.getLogger(__name__)

_PANEL, _GAP, _HEAD = 168, 6, 22  # pixels
_TITLES = ("image", "class token, last block", "rollout")


@checked
class AttentionPicture(L.Callback):
    """Callback that draws where the class token looks: attention of the last block, and rollout.

    It draws the first validation images, with the raw weights; loggers get the picture too.

    Args:
        path: file of the picture, without its suffix; each picture has its epoch in its name.
        every: epochs between two pictures; None for none.
        count: maximum number of images.
    """

    def __init__(self, path: str | Path, every: PositiveInt | None = None, count: PositiveInt = 6) -> None:
        self.path, self.every, self.count = Path(path), every, count

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: ImageClassifier,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch; all processes compute, because a sharded model needs them."""
        if self.every is None or batch_idx > 0 or trainer.sanity_checking:
            return
        epoch = trainer.current_epoch + 1
        if epoch % self.every and epoch != trainer.max_epochs:
            return
        try:
            with trainer.precision_plugin.val_step_context():
                weights = attention_weights(pl_module.model, batch.image[: self.count])
        except ConfigError as error:
            log.warning("callbacks.attention: %s", error)
            self.every = None
            return
        if trainer.is_global_zero:
            spec = trainer.datamodule.input  # type: ignore[attr-defined]
            images = batch.image[: self.count]
            maps = [maps_of(flow, pl_module.model, images) for flow in (weights[-1], rollout(weights))]
            picture = attention_sheet(denormalise(images, spec.mean, spec.std), maps)
            picture.save(self.path.with_name(f"{self.path.name}_{epoch:03}.png"))
            for logger in trainer.loggers:
                log_picture(logger, picture, "attention")


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
