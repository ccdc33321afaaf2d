"""Pictures of some validation images every few epochs: predictions, and where the network looks.

What a network looks at is also drawn over the epochs of a training, with one sheet per kind of map.

Shapes: B images of H x W pixels, C classes.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitrail.data.sampling import sample_of
from vitrail.errors import ConfigError
from vitrail.models.explanations import Explanation, Kind, explain
from vitrail.reporting.explanations import add_to_sheets, explanation_sheet
from vitrail.reporting.pictures import denormalise, image_grid, log_picture
from vitrail.reporting.tables import describe, shortened
from vitrail.training import ImageClassifier
from vitrail.types import IGNORE, Batch, Item
from vitrail_runtime.checking import PositiveInt, checked

log = logging.getLogger(__name__)


@checked
class ValidationPicture(L.Callback):
    """Base of callbacks that draw some validation images every few epochs and after the last one.

    The images are evenly spread over the validation set, which is sorted by class. The pictures are of the raw weights.
    Loggers keep all of them, the file the last one.

    Args:
        path: file of the last picture.
        every: epochs between two pictures; None for none.
        count: maximum number of images.
    """

    name = ""
    """Name of the picture for loggers, and of the callback in the config."""

    def __init__(self, path: str | Path, every: PositiveInt | None = None, count: PositiveInt = 24) -> None:
        self.path, self.every, self.count = Path(path), every, count

    def draw(self, module: ImageClassifier, batch: Batch, data: Any) -> Image.Image:
        """Return the picture of the first `count` images of a batch.

        All processes call this, because a sharded model needs them.
        """
        raise NotImplementedError

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: ImageClassifier,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images at the first batch, if it is this epoch's turn."""
        if batch_idx > 0 or dataloader_idx > 0 or not self.is_due(trainer):
            return
        if batch.image.ndim < 4:  # features that a linear probe keeps in memory
            return
        try:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            with trainer.precision_plugin.val_step_context():
                picture = self.draw(pl_module, _with_spread_images(batch, data.val, self.count), data)
        except ConfigError as error:
            log.warning("callbacks.%s: %s", self.name, error)
            self.every = None
            return
        self.save(trainer, picture)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether it is this epoch's turn."""
        epoch = trainer.current_epoch + 1
        return (
            self.every is not None
            and not trainer.sanity_checking
            and (epoch % self.every == 0 or epoch == trainer.max_epochs)
        )

    def save(self, trainer: L.Trainer, picture: Image.Image) -> None:
        """Save the picture of this epoch, and log it."""
        if trainer.is_global_zero:
            picture.save(self.path)
            for logger in trainer.loggers:
                log_picture(logger, picture, self.name, trainer.current_epoch)


def _with_spread_images(batch: Batch, dataset: Sequence[Item], count: int) -> Batch:
    """Return a batch whose first images are `count` ones that are evenly spread over the data set.

    It keeps its size, so that nothing is compiled for another one.
    """
    items = [dataset[int(index)] for index in sample_of(len(dataset), min(count, len(batch.image)))]
    images, labels = batch.image.clone(), batch.label.clone()
    images[: len(items)] = torch.stack([item.image for item in items]).to(images)
    labels[: len(items)] = torch.tensor([item.label for item in items]).to(labels)
    return batch._replace(image=images, label=labels)


class PredictionPicture(ValidationPicture):
    """Callback that draws validation images with their most likely class, red if it is wrong, and their label."""

    name = "predictions"

    def draw(self, module: ImageClassifier, batch: Batch, data: Any) -> Image.Image:
        """Return the picture of a batch; the whole batch is computed, so that nothing is compiled for another size."""
        probabilities = module(batch.image)[: self.count].float().softmax(-1).cpu()
        labels = batch.label[: self.count].tolist()
        best = probabilities.max(-1)
        captions = [
            _caption(probability, data.classes[index], None if label == IGNORE else data.classes[label])
            for probability, index, label in zip(best.values.tolist(), best.indices.tolist(), labels, strict=True)
        ]
        wrong = [label not in (IGNORE, index) for index, label in zip(best.indices.tolist(), labels, strict=True)]
        images = denormalise(batch.image[: self.count], data.input.mean, data.input.std)
        return image_grid(images, captions, ["firebrick" if is_wrong else "black" for is_wrong in wrong])


@checked
class AttentionPicture(ValidationPicture):
    """Callback that draws what explains the predictions of validation images: where a ViT looks, and more.

    Each kind of map is also collected over the epochs: `<kind>_over_epochs.png` next to `path` has a row per image and
    a column per epoch, also of a resumed training. Loggers get these sheets at the end of the training.

    Args:
        path: file of the last picture.
        every: epochs between two pictures; None for none.
        count: maximum number of images.
        kinds: maps to draw, see `vitrail.models.explanations.explain`.
    """

    name = "attention"

    def __init__(
        self,
        path: str | Path,
        every: PositiveInt | None = None,
        count: PositiveInt = 6,
        kinds: Sequence[Kind] = ("attention", "rollout"),
    ) -> None:
        super().__init__(path, every, count)
        self.kinds = tuple(kinds)
        self._newest: tuple[NDArray[np.uint8], Explanation, Sequence[str]] | None = None
        self._drawn: int | None = None  # epoch of the newest columns of the sheets, from 0

    def draw(self, module: ImageClassifier, batch: Batch, data: Any) -> Image.Image:
        """Return the picture of a batch, and remember its maps for the sheets over the epochs.

        Raises:
            ConfigError: the network cannot give one of the kinds.
        """
        images = batch.image[: self.count]
        found = explain(module.model, images, self.kinds)
        self._newest = denormalise(images, data.input.mean, data.input.std), found, data.classes
        return explanation_sheet(*self._newest)

    def on_train_start(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
        """Remove the sheets of another training with the same path."""
        if trainer.is_global_zero and trainer.global_step == 0:
            for path in self._sheets().values():
                path.unlink(missing_ok=True)

    def save(self, trainer: L.Trainer, picture: Image.Image) -> None:
        """Save the picture of this epoch, log it, and add its maps to the sheets over the epochs."""
        super().save(trainer, picture)
        if trainer.is_global_zero and self._newest is not None:
            self._drawn = trainer.current_epoch
            add_to_sheets(self._sheets(), self._drawn + 1, *self._newest)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the sheets that this training has drawn on."""
        if self._drawn is None:
            return
        for path in self._sheets().values():
            with Image.open(path) as sheet:
                for logger in trainer.loggers:
                    log_picture(logger, sheet.convert("RGB"), path.stem, self._drawn)

    def _sheets(self) -> dict[str, Path]:
        """Return the file of the sheet over the epochs of each kind."""
        return {kind: self.path.with_name(f"{kind}_over_epochs.png") for kind in self.kinds}


def _caption(probability: float, predicted: str, label: str | None) -> str:
    shown = f"{shortened(describe(predicted), 18)}, p {probability:.2f}"
    return shown if label is None else f"{shown}\nlabel {shortened(describe(label), 18)}"
