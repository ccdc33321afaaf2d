"""What a backbone says of each image of an evaluation, on any number of processes."""

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
    """One row an image; classes are counted as the backbone does."""

    keys: list[str]
    labels: NDArray[np.int64]  # (N,) of the data set
    losses: NDArray[np.float64]  # (N,) cross-entropy with the label
    classes: NDArray[np.int64]  # (N, K) the likeliest, K = 5 or all there are
    probabilities: NDArray[np.float64]  # (N, K) theirs


class Predictor(L.LightningModule):
    """Validate a backbone and keep, in `predictions`, what it says of each image; the same on every process.

    Args:
        model: backbone.
        chosen: the backbone's class of each class of the data; None where both count alike.
        among: classes of the backbone to choose among; None for all. Probabilities are of these alone.
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
        """Forget an earlier validation."""
        self._parts = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep what is said of one batch: images (B, 3, H, W), labels (B,), `IGNORE` where not to count."""
        logits = forward_heads(self.model, batch.image).merged().float()
        if self._among is not None:
            left = torch.full_like(logits, -torch.inf)
            left[:, self._among] = logits[:, self._among]
            logits = left
        counted = batch.label.cpu() != IGNORE
        labels = batch.label.cpu()[counted]
        labels = labels if self._chosen is None else self._chosen[labels]
        scores = logits.cpu()[counted].log_softmax(-1).double()
        best = scores.topk(min(5, scores.shape[1] if self._among is None else len(self._among)))
        keys = [key for key, counts in zip(batch.key, counted.tolist(), strict=True) if counts]
        self._parts.append((keys, labels, F.nll_loss(scores, labels, reduction="none"), best.indices, best.values))

    def on_validation_epoch_end(self) -> None:
        """Bring the images of all processes together."""
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
