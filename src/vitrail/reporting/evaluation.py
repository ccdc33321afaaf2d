"""Results of an evaluation: accuracies, calibration and confusions, as tables and CSV files.

Shapes: N images, K most likely classes of an image.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Group
from torchmetrics.functional.classification import binary_calibration_error

from vitrail.reporting.tables import describe
from vitrail.training.predictions import Predictions
from vitrail_runtime.tables import PlainTable

BINS = 15  # bins of the calibration error, as in Guo et al., arXiv:1706.04599


class ClassScore(NamedTuple):
    """Scores of one class; `top1` and `top5` are shares of its images."""

    label: int
    images: int
    top1: float
    top5: float
    confidence: float  # mean probability of the predicted class
    wrong: list[tuple[int, int]]  # (wrongly predicted class, number of images), most frequent first


@dataclass(frozen=True)
class Evaluation:
    """Scores of predictions against the labels.

    Attributes:
        loss: mean cross-entropy with the label; None if images can have several labels.
        top1: share of images whose most likely class is right.
        top5: share of images with a right class among the five most likely.
        calibration_error: mean gap between confidence and accuracy over 15 equal bins of confidence.
        confidence: (N,) probability of the most likely class of each image.
        correct: (N,) whether that class is right.
        classes: scores of each class that has images, in the order of the classes.
    """

    loss: float | None
    top1: float
    top5: float
    calibration_error: float
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    classes: list[ClassScore]

    @classmethod
    def of(cls, predictions: Predictions, label_sets: Mapping[str, Sequence[int]] | None = None) -> "Evaluation":
        """Compute the scores of predictions.

        Args:
            predictions: predictions for all N images.
            label_sets: for data with several labels per image: the right classes of each image, by its key. Images
                without any are not counted.
        """
        if label_sets is None:
            truths: list[Sequence[int]] = [(int(label),) for label in predictions.labels]
        else:
            truths = [label_sets[key] for key in predictions.keys]
        counted = [index for index, truth in enumerate(truths) if len(truth)]
        answers, confidence = predictions.classes[counted], predictions.probabilities[counted, 0]
        hits = np.array([np.isin(answer, truths[index]) for answer, index in zip(answers, counted, strict=True)])
        correct, among_five = hits[:, 0], np.asarray(hits.any(1))
        members: dict[int, list[int]] = {}
        for row, index in enumerate(counted):
            for label in truths[index]:
                members.setdefault(int(label), []).append(row)
        classes = []
        for label, rows in sorted(members.items()):
            wrong = Counter(int(answers[row, 0]) for row in rows if not correct[row])
            top1, top5, sure = (float(np.mean(values[rows])) for values in (correct, among_five, confidence))
            classes.append(ClassScore(label, len(rows), top1, top5, sure, wrong.most_common()))
        error = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct).long(), n_bins=BINS)
        loss = float(predictions.losses.mean()) if label_sets is None else None
        return cls(loss, float(correct.mean()), float(among_five.mean()), float(error), confidence, correct, classes)

    def summary(self) -> dict[str, float | int | None]:
        """Return number of images and loss, and the accuracies and calibration error in %."""
        return {
            "images": len(self.correct),
            "loss": self.loss,
            "top1": 100 * self.top1,
            "top5": 100 * self.top5,
            "calibration_error": 100 * self.calibration_error,
        }

    def worst(self, count: int) -> list[ClassScore]:
        """Return the `count` classes with the lowest top-1; of equal ones, larger classes come first."""
        return sorted(self.classes, key=lambda score: (score.top1, -score.images))[:count]

    def write(self, folder: Path, suffix: str, names: Sequence[str], predictions: Predictions) -> None:
        """Write `classes_<suffix>.csv`, `confusions_<suffix>.csv` and `images_<suffix>.csv` to a folder."""
        with (folder / f"classes_{suffix}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("class", "name", "images", "top1", "top5", "confidence"))
            for score in self.classes:
                name = names[score.label]
                shares = (f"{100 * share:.2f}" for share in (score.top1, score.top5, score.confidence))
                rows.writerow((name, describe(name), score.images, *shares))
        with (folder / f"confusions_{suffix}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("class", "called", "images"))
            for score in self.classes:
                rows.writerows((names[score.label], names[called], images) for called, images in score.wrong)
        with (folder / f"images_{suffix}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("image", "label", "called", "probability"))
            for key, label, called, probability in zip(
                predictions.keys, predictions.labels, predictions.classes, predictions.probabilities, strict=True
            ):
                rows.writerow((key, names[label], names[called[0]], f"{probability[0]:.4f}"))


def evaluation_report(evaluations: Mapping[str, Evaluation], names: Sequence[str], what: str) -> Group:
    """Return tables with the scores of each set of weights, and with the worst classes of the last set."""
    table = PlainTable(title=what, title_style="bold")
    for name in ("weights", "images", "loss", "top-1 %", "top-5 %", "calibration error %"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for weights, evaluation in evaluations.items():
        loss = "-" if evaluation.loss is None else f"{evaluation.loss:.4f}"
        shares = (evaluation.top1, evaluation.top5, evaluation.calibration_error)
        table.add_row(weights, f"{len(evaluation.correct)}", loss, *(f"{100 * share:.2f}" for share in shares))
    last = list(evaluations)[-1]
    worst = PlainTable(title=f"Worst classes, {last} weights", title_style="bold")
    for name in ("class", "images", "top-1 %", "predicted instead"):
        worst.add_column(name, justify="right" if name in ("images", "top-1 %") else "left", overflow="fold")
    for score in evaluations[last].worst(10):
        called = ", ".join(f"{describe(names[label])} {images / score.images:.0%}" for label, images in score.wrong[:3])
        worst.add_row(describe(names[score.label]), str(score.images), f"{100 * score.top1:.1f}", called)
    return Group(table, worst)
