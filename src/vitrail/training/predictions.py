"""Predictions of a backbone for each image of an evaluation, gathered from any number of processes.

Shapes: B images of a batch, N images in total, C classes, K most likely classes of an image, H x W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrail.models import forward_heads
from vitrail.types import IGNORE, Batch


class Predictions(NamedTuple):
    """Predictions with one row per image; class indices are the backbone's."""

    keys: list[str]
    labels: NDArray[np.int64]  # (N,) labels of the data set
    losses: NDArray[np.float64]  # (N,) cross-entropy with the label
    classes: NDArray[np.int64]  # (N, K) most likely classes; K = 5, or fewer if there are fewer classes
    probabilities: NDArray[np.float64]  # (N, K) probabilities of these classes


class Predictor(L.LightningModule):
    """LightningModule that collects the predictions for all validation images, the same on every process.

    Args:
        model: backbone.
        chosen: the backbone's class index of each class of the data; None if the indices are the same.
        among: the backbone's classes to predict; None for all. Probabilities sum to 1 over these classes.
    """

    predictions: Predictions

    def __init__(
        self, model: nn.Module, chosen: Sequence[int] | None = None, among: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._chosen = None if chosen is None else torch.tensor(chosen)
        self._among = None if among is None else torch.tensor(among)
        self._parts: list[tuple[list[str], Tensor, Tensor, Tensor, Tensor]] = []

    def on_validation_epoch_start(self) -> None:
        """Discard the predictions of an earlier validation."""
        self._parts = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Predict images (B, 3, H, W) with labels (B,); images labelled `IGNORE` are not counted."""
        logits = forward_heads(self.model, batch.image).merged().float()
        if self._among is not None:
            masked = torch.full_like(logits, -torch.inf)
            masked[:, self._among] = logits[:, self._among]
            logits = masked
        counted = batch.label.cpu() != IGNORE
        labels = batch.label.cpu()[counted]
        labels = labels if self._chosen is None else self._chosen[labels]
        scores = logits.cpu()[counted].log_softmax(-1).double()
        best = scores.topk(min(5, scores.shape[1] if self._among is None else len(self._among)))
        keys = [key for key, counts in zip(batch.key, counted.tolist(), strict=True) if counts]
        self._parts.append((keys, labels, F.nll_loss(scores, labels, reduction="none"), best.indices, best.values))

    def on_validation_epoch_end(self) -> None:
        """Gather the predictions of all processes, sorted by key."""
        parts = self._parts
        if self.trainer.world_size > 1:
            gathered: list[list[tuple[list[str], Tensor, Tensor, Tensor, Tensor]]] = [[]] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        keys = [key for part in parts for key in part[0]]
        labels, losses, classes, scores = (torch.cat(column).numpy() for column in list(zip(*parts, strict=True))[1:])
        order = np.argsort(np.array(keys), kind="stable")
        self.predictions = Predictions(
            [keys[index] for index in order], labels[order], losses[order], classes[order], np.exp(scores[order])
        )
