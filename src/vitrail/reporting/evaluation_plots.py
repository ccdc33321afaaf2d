"""Figure of an evaluation: calibration, accuracy of each class, and confusions of the worst classes."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vitrail.reporting.evaluation import BINS, ClassScore, Evaluation
from vitrail.reporting.tables import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAIN, _OTHER = "#006ec8", "#dc5a00"
_MOST_COLUMNS = 16


def evaluation_figure(evaluation: Evaluation, names: Sequence[str], title: str, worst: int = 12) -> "Figure":
    """Draw three panels: calibration, sorted accuracies of all classes, and confusions of the worst classes.

    Args:
        evaluation: evaluation to draw.
        names: class names.
        title: title of the figure.
        worst: maximum number of classes in the third panel.
    """
    from matplotlib.figure import Figure

    scores = evaluation.worst(worst)
    columns = _columns(scores)
    figure = Figure(figsize=(10 + 0.34 * len(columns), 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(4, 4, max(2.5, 0.34 * len(columns) + 2)))
    figure.suptitle(title)
    _draw_calibration(panels[0], evaluation)
    _draw_classes(panels[1], evaluation)
    _draw_confusions(panels[2], scores, columns, names)
    return figure


def _draw_calibration(axes: "Axes", evaluation: Evaluation) -> None:
    bins = np.clip((evaluation.confidence * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = np.flatnonzero(counts)
    accuracy = [100 * evaluation.correct[bins == number].mean() for number in used]
    # The width of a bar shows the number of its images, so that rare confidences do not look common.
    axes.bar(
        100 * (used + 0.5) / BINS, accuracy, np.maximum(0.6, 100 / BINS * counts[used] / counts.max()), color=_MAIN
    )
    axes.plot((0, 100), (0, 100), color=_OTHER)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence, %", ylabel="accuracy, %")
    axes.set_title(f"Calibration error {100 * evaluation.calibration_error:.1f} %")


def _draw_classes(axes: "Axes", evaluation: Evaluation) -> None:
    shares = sorted(100 * score.top1 for score in evaluation.classes)
    axes.bar(range(len(shares)), shares, 1.0 if len(shares) > 60 else 0.9, color=_MAIN)
    axes.axhline(float(np.mean(shares)), color=_OTHER)
    axes.set(ylim=(0, 100), xlabel="classes, worst first", ylabel="top-1, %", xticks=[])
    axes.set_title(f"Top-1 of each of {len(shares)} classes")


def _columns(scores: Sequence[ClassScore]) -> list[int]:
    """Return the classes of `scores`, followed by those that are most often predicted instead of them."""
    confused: Counter[int] = Counter()
    for score in scores:
        confused.update(dict(score.wrong[:3]))
    labels = [score.label for score in scores]
    others = [label for label, _ in confused.most_common() if label not in labels]
    return labels + others[: max(0, _MOST_COLUMNS - len(labels))]


def _draw_confusions(axes: "Axes", scores: Sequence[ClassScore], columns: Sequence[int], names: Sequence[str]) -> None:
    """Draw the worst classes as rows and their predicted classes as columns, in % of the row's images."""
    table = np.zeros((len(scores), len(columns)))
    for row, score in enumerate(scores):
        predicted = {**dict(score.wrong), score.label: round(score.top1 * score.images)}
        table[row] = [100 * predicted.get(label, 0) / score.images for label in columns]
    axes.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in zip(*np.nonzero(table >= 0.5), strict=True):
        share, is_right = table[row, column], scores[row].label == columns[column]
        text = axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
        text.set(color="white" if share > 50 else "black", weight="bold" if is_right else "normal")
    short = [describe(names[label])[:24] for label in columns]
    axes.set_xticks(range(len(columns)), short, rotation=90, fontsize=8)
    axes.set_yticks(range(len(scores)), short[: len(scores)], fontsize=8)
    axes.set_title("Predictions for the worst classes, %")
