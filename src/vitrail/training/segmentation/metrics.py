"""Metrics of semantic segmentation, all from one confusion matrix of the whole set.

Shapes: C classes, H x W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from vitrail.types import MASK_IGNORE


class SegmentationScores(NamedTuple):
    """Scores in [0, 1]."""

    iou: Tensor
    """(C,) intersection over union; NaN for a class that is neither labelled nor predicted."""
    accuracy: Tensor
    """(C,) recall; NaN for a class that is not labelled."""
    all_accuracy: Tensor
    """() share of the labelled pixels that are right."""

    def summary(self) -> dict[str, Tensor]:
        """Return mIoU, mAcc and aAcc in %, means over the classes that have a value."""
        means = {"mIoU": self.iou.nanmean(), "mAcc": self.accuracy.nanmean(), "aAcc": self.all_accuracy}
        return {name: 100 * value for name, value in means.items()}


def scores_of(confusion: Tensor) -> SegmentationScores:
    """Return the scores of a confusion matrix (C, C) of labels by predictions."""
    counts = confusion.double()
    right, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return SegmentationScores(right / (labelled + predicted - right), right / labelled, right.sum() / labelled.sum())


class SegmentationMetrics(nn.Module):
    """mIoU, mAcc and aAcc of all pixels that are not `MASK_IGNORE`, over all processes.

    The areas of the whole set are summed before they are divided: means of images, batches or processes differ.

    Args:
        num_classes: number of classes, C.

    Attributes:
        latest: scores at the last reset.
        images: labelled images at the last reset.
    """

    latest: SegmentationScores
    images: int

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=MASK_IGNORE, validate_args=False)
        self.count = SumMetric(nan_strategy="disable")

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Add predicted classes (H, W) and the mask (H, W) of an image."""
        self.confusion.update(predictions.flatten(), masks.flatten().long())
        self.count.update((masks != MASK_IGNORE).any())  # not the samples that fill up the processes

    def scores(self) -> SegmentationScores:
        """Return the scores since the last reset, over all processes."""
        return scores_of(self.confusion.compute())

    def compute_and_reset(self, prefix: str) -> dict[str, Tensor]:
        """Return mIoU, mAcc and aAcc in % since the last call."""
        self.latest = self.scores()
        summary = self.latest.summary()
        self.images = int(self.count.compute())
        self.confusion.reset()
        self.count.reset()
        return {f"{prefix}{name}": value.to(torch.float32) for name, value in summary.items()}
