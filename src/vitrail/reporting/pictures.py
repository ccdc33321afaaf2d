"""Pictures of a network's input.

Shapes: B images of H x W pixels.
"""

import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrail.reporting.tables import shortened
from vitrail.training import TargetBuilder
from vitrail.types import Batch
from vitrail_runtime.checking import PositiveInt, checked

log = logging.getLogger(__name__)

_TILE = 144  # pixels
_CAPTION = 30


@checked
class FirstBatchPicture(L.Callback):
    """Callback that saves the first training batch, augmented and mixed, with its labels, as a picture.

    Loggers that support pictures get it too. It reveals a wrong mean, mirrored digits or wrong labels.

    Args:
        path: file of the picture.
        count: maximum number of images in the picture.
    """

    def __init__(self, path: str | Path, count: PositiveInt = 24) -> None:
        self.path, self.count = Path(path), count

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first batch, unless the run is resumed or trains on cached features."""
        if not trainer.is_global_zero or trainer.global_step > 0 or batch_idx > 0 or batch.image.ndim != 4:
            return
        picture = self.draw(batch, trainer.datamodule)  # type: ignore[attr-defined]
        picture.save(self.path)
        for logger in trainer.loggers:
            log_picture(logger, picture, "first_batch")

    def draw(self, batch: Batch, data: Any) -> Image.Image:
        """Return the picture of a batch of `data`, a data module."""
        return batch_grid(batch, data.classes, data.input.mean, data.input.std, self.count)


def log_picture(logger: Any, picture: Image.Image, name: str, epoch: int | None = None) -> None:
    """Log a picture if the logger supports pictures; with `epoch` (from 0) as one of a series."""
    file = f"{name}.png" if epoch is None else f"{name}/{name}_{epoch + 1:03}.png"
    acts: dict[str, Callable[[], Any]] = {
        "WandbLogger": lambda: _log_to_wandb(logger, picture, name, epoch),
        "TensorBoardLogger": lambda: logger.experiment.add_image(name, np.asarray(picture), epoch, dataformats="HWC"),
        "MLFlowLogger": lambda: logger.experiment.log_image(logger.run_id, picture, file),
    }
    if act := acts.get(type(logger).__name__):
        getattr(logger, "attempt", lambda act: act())(act)
        logger.pictures = list(dict.fromkeys([*getattr(logger, "pictures", ()), name]))  # for W&B's dashboard


def _log_to_wandb(logger: Any, picture: Image.Image, name: str, epoch: int | None) -> None:
    import wandb

    series = {} if epoch is None else {"epoch": epoch}
    logger.experiment.log({name: [wandb.Image(picture)], **series})


def batch_grid(
    batch: Batch, classes: list[str], mean: tuple[float, ...], std: tuple[float, ...], count: PositiveInt = 24
) -> Image.Image:
    """Draw up to `count` images of a batch in a grid, each with its label or, if mixed, its two most likely labels.

    Args:
        batch: normalised images (B, 3, H, W), mixed or not.
        classes: class names.
        mean: mean of the normalisation, per channel.
        std: standard deviation of the normalisation, per channel.
        count: maximum number of images.
    """
    labels = TargetBuilder.class_labels(batch, len(classes))
    images = denormalise(batch.image[:count], mean, std)
    return image_grid(images, [_caption(labels[number], classes) for number in range(len(images))])


def image_grid(images: NDArray[np.uint8], captions: Sequence[str], colours: Sequence[str] | None = None) -> Image.Image:
    """Draw images (B, H, W, 3) in rows of eight, each with up to two lines of caption in its colour; None for black."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (_TILE + 4) + 4, rows * (_TILE + _CAPTION + 4) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, image in enumerate(images):
        x, y = 4 + number % columns * (_TILE + 4), 4 + number // columns * (_TILE + _CAPTION + 4)
        tile = Image.fromarray(image)
        tile = tile.resize((_TILE, _TILE), Image.Resampling.NEAREST if max(tile.size) < _TILE else Image.Resampling.BOX)
        sheet.paste(tile, (x, y))
        draw.text((x, y + _TILE + 2), captions[number], fill=colours[number] if colours else "black", font=font)
    return sheet


def denormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.uint8]:
    """Convert normalised images (B, 3, H, W) to pixels (B, H, W, 3), uint8."""
    images = images.detach().float().cpu()
    scaled = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (scaled.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _caption(label: Tensor, classes: list[str]) -> str:
    if label.ndim == 0:
        return "\n".join(textwrap.wrap(classes[int(label)], 24)[:2])
    shares, indices = label.float().cpu().topk(min(2, len(classes)))
    parts = [(float(share), classes[int(index)]) for share, index in zip(shares, indices, strict=True) if share > 0.005]
    return "\n".join(f"{share:.2f} {shortened(name, 19)}" for share, name in parts)
