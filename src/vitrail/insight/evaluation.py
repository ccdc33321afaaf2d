"""What an evaluation says: accuracies, calibration, the classes that go wrong; as tables, CSV files and a picture."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Group
from rich.table import Table
from torchmetrics.functional.classification import binary_calibration_error

from vitrail.insight.tables import describe
from vitrail.training.predictions import Predictions

BINS = 15  # of the calibration error, as in Guo et al., arXiv:1706.04599


class ClassScore(NamedTuple):
    """How the images of one class fare; shares of these images."""

    label: int
    images: int
    top1: float
    top5: float
    confidence: float  # mean probability of the answer
    wrong: list[tuple[int, int]]  # (class that it is called instead, images), most frequent first


@dataclass(frozen=True)
class Evaluation:
    """Predictions against the truth.

    Attributes:
        loss: mean cross-entropy with the label; None where an image can have several.
        top1: share of images whose likeliest class is right.
        top5: share of images with a right class among the five likeliest.
        calibration_error: mean gap between confidence and accuracy over 15 equal bins of confidence.
        confidence: (N,) probability of the likeliest class of each image.
        correct: (N,) whether it is right.
        classes: of every class that has images, in the order of the classes.
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
        """Count.

        Args:
            predictions: of all images.
            label_sets: for data with several labels an image: by its key, the classes that are right. Images without
                any do not count.
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
        """Image count, loss, and the rest in %."""
        return {
            "images": len(self.correct),
            "loss": self.loss,
            "top1": 100 * self.top1,
            "top5": 100 * self.top5,
            "calibration_error": 100 * self.calibration_error,
        }

    def worst(self, count: int) -> list[ClassScore]:
        """Classes of lowest top-1, the larger ones first among equals."""
        return sorted(self.classes, key=lambda score: (score.top1, -score.images))[:count]

    def write(self, folder: Path, suffix: str, names: Sequence[str], predictions: Predictions) -> None:
        """Write `classes_<suffix>.csv`, `confusions_<suffix>.csv` (wrong answers) and `images_<suffix>.csv`."""
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
    """The figures of each set of weights, and the classes that are worst with the last of them."""
    table = Table(title=what, title_style="bold")
    for name in ("weights", "images", "loss", "top-1 %", "top-5 %", "calibration error %"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for weights, evaluation in evaluations.items():
        loss = "-" if evaluation.loss is None else f"{evaluation.loss:.4f}"
        shares = (evaluation.top1, evaluation.top5, evaluation.calibration_error)
        table.add_row(weights, f"{len(evaluation.correct)}", loss, *(f"{100 * share:.2f}" for share in shares))
    last = list(evaluations)[-1]
    worst = Table(title=f"Classes that are worst, {last} weights", title_style="bold")
    for name in ("class", "images", "top-1 %", "called instead"):
        worst.add_column(name, justify="right" if name in ("images", "top-1 %") else "left", overflow="fold")
    for score in evaluations[last].worst(10):
        called = ", ".join(f"{describe(names[label])} {images / score.images:.0%}" for label, images in score.wrong[:3])
        worst.add_row(describe(names[score.label]), str(score.images), f"{100 * score.top1:.1f}", called)
    return Group(table, worst)


Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_INK, _GRID, _BAR, _GAP_COLOUR = (30, 30, 30), (225, 225, 225), (0, 110, 200), (220, 90, 0)
_SIDE, _MARGIN = 300, 56  # pixels
_SMALL = ImageFont.load_default(size=11)


def _short(name: str) -> str:
    return describe(name)[:24]


def evaluation_picture(evaluation: Evaluation, names: Sequence[str], what: str, worst: int = 12) -> Image.Image:
    """Three panels: calibration, accuracies of all classes in order, and what the worst classes are called instead.

    Args:
        evaluation: what to draw.
        names: of the classes.
        what: title.
        worst: classes in the third panel, at most.
    """
    scores = evaluation.worst(worst)
    columns = _columns(scores)
    cell = 24
    written = [names[score.label] for score in scores] + [names[label] for label in columns]
    label_width = 24 + max(int(_SMALL.getlength(_short(name))) for name in written)
    matrix = (max(160, label_width + cell * len(columns)) + 20, label_width + cell * len(scores))
    width = 2 * (_SIDE + _MARGIN + 20) + _MARGIN + matrix[0]
    height = 76 + max(_SIDE + _MARGIN, matrix[1])
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    draw.text((_MARGIN, 8), what, _INK, ImageFont.load_default(size=15))
    _draw_calibration(draw, (_MARGIN, 76), evaluation, font)
    _draw_classes(draw, (2 * _MARGIN + _SIDE + 20, 76), evaluation, font)
    _draw_confusions(sheet, (3 * _MARGIN + 2 * _SIDE + 40, 76), scores, columns, names, cell, label_width)
    return sheet


def _frame(draw: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, axes: tuple[str, str], font: Font) -> None:
    """A square from 0 to 100 % upwards, with grid lines."""
    x, y = corner
    draw.text((x, y - 40), title, _INK, font)
    draw.text((x, y - 24), axes[1], (120, 120, 120), font)
    for percent in range(0, 101, 20):
        level = y + _SIDE - _SIDE * percent / 100
        draw.line((x, level, x + _SIDE, level), _GRID)
        draw.text((x - 6, level), f"{percent} %", _INK, font, anchor="rm")
    draw.text((x + _SIDE / 2, y + _SIDE + 22), axes[0], _INK, font, anchor="ma")


def _draw_calibration(draw: ImageDraw.ImageDraw, corner: tuple[int, int], evaluation: Evaluation, font: Font) -> None:
    x, y = corner
    title = f"Calibration error {100 * evaluation.calibration_error:.1f} %"
    _frame(draw, corner, title, ("confidence", "accuracy (bars as wide as there are images)"), font)
    bins = np.clip((evaluation.confidence * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    step = _SIDE / BINS
    for number in np.flatnonzero(counts):
        accuracy = evaluation.correct[bins == number].mean()
        half = max(1.0, step / 2 * counts[number] / counts.max())
        middle = x + step * (number + 0.5)
        draw.rectangle((middle - half, y + _SIDE * (1 - accuracy), middle + half, y + _SIDE), _BAR)
    draw.line((x, y + _SIDE, x + _SIDE, y), _GAP_COLOUR, 2)  # where confidence is accuracy
    for percent in range(0, 101, 20):
        draw.text((x + _SIDE * percent / 100, y + _SIDE + 4), f"{percent} %", _INK, font, anchor="ma")


def _draw_classes(draw: ImageDraw.ImageDraw, corner: tuple[int, int], evaluation: Evaluation, font: Font) -> None:
    x, y = corner
    shares = sorted(score.top1 for score in evaluation.classes)
    _frame(draw, corner, f"Top-1 of each of {len(shares)} classes", ("classes, worst first", "top-1"), font)
    for number, share in enumerate(shares):
        left, right = (x + _SIDE * place / len(shares) for place in (number, number + 1))
        draw.rectangle((left, y + _SIDE * (1 - share), max(left, right - 1), y + _SIDE), _BAR)
    mean = y + _SIDE * (1 - sum(shares) / len(shares))
    draw.line((x, mean, x + _SIDE, mean), _GAP_COLOUR, 2)


def _columns(scores: Sequence[ClassScore], most: int = 16) -> list[int]:
    """The classes of `scores`, and those that they are most often called instead."""
    called: Counter[int] = Counter()
    for score in scores:
        called.update(dict(score.wrong[:3]))
    own = [score.label for score in scores]
    others = [label for label, _ in called.most_common() if label not in own]
    return own + others[: max(0, most - len(own))]


def _draw_confusions(
    sheet: Image.Image,
    corner: tuple[int, int],
    scores: Sequence[ClassScore],
    columns: Sequence[int],
    names: Sequence[str],
    cell: int,
    label_width: int,
) -> None:
    """Rows are the worst classes, columns what they are called; darker for a larger share of the row's images."""
    x, y = corner
    draw, font = ImageDraw.Draw(sheet), _SMALL
    draw.text((x, y - 40), "The worst classes", _INK, ImageFont.load_default(size=12))
    draw.text((x, y - 24), "what they are called, %", (120, 120, 120), ImageFont.load_default(size=12))
    top = y + label_width - 20
    for number, label in enumerate(columns):
        text = Image.new("RGB", (label_width - 24, 16), "white")
        ImageDraw.Draw(text).text((0, 1), _short(names[label]), _INK, font)
        sheet.paste(text.rotate(90, expand=True), (x + label_width + cell * number + 4, y))
    for row, score in enumerate(scores):
        level = top + cell * row
        draw.text((x + label_width - 6, level + cell / 2), _short(names[score.label]), _INK, font, anchor="rm")
        said = {**dict(score.wrong), score.label: round(score.top1 * score.images)}
        for number, label in enumerate(columns):
            share = said.get(label, 0) / score.images
            base = _BAR if label == score.label else _GAP_COLOUR
            shade = tuple(round(255 - (255 - part) * min(1.0, 0.04 + share)) for part in base) if share else (250,) * 3
            left = x + label_width + cell * number
            draw.rectangle((left, level, left + cell - 2, level + cell - 2), shade)
            if share >= 0.005:
                colour = "white" if share > 0.5 else _INK
                draw.text((left + cell / 2 - 1, level + cell / 2), f"{100 * share:.0f}", colour, font, anchor="mm")
