"""Tables and curves of comparisons whose runs are paired by seed."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from digits_on_photographs import console
from rich.table import Table
from scipy import stats

matplotlib.use("Agg")
REACHED = 80.0  # top-1 in %, for the number of epochs until then
COLOURS = {"labels": "C0", "with": "C0", "class": "C2", "patches": "C4", "features": "C2", "neither": "C1"}
Curves = dict[str, dict[int, list[float]]]
"""Top-1 in % after each epoch, by way of training and seed."""


def interval(differences: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of the mean of paired differences (Student's t)."""
    count = len(differences)
    return float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def epochs_until(accuracies: Sequence[float], least: float = REACHED) -> int:
    """Return the number of epochs until top-1 is at least `least`; one more than all if it never is."""
    return next((epoch for epoch, value in enumerate(accuracies, 1) if value >= least), len(accuracies) + 1)


def report(curves: Curves, title: str) -> dict[str, float]:
    """Print and return final top-1 of each seed, mean, spread, and the paired difference to the last kind."""
    table = Table(title=title)
    *_, last = curves
    seeds = list(curves[last])
    for name in ("", *(f"seed {seed}" for seed in seeds), "mean", "difference", "epochs"):
        table.add_column(name, justify="right")
    figures: dict[str, float] = {}
    for kind, runs in curves.items():
        final = [runs[seed][-1] for seed in seeds]
        waits = statistics.mean(epochs_until(runs[seed]) for seed in seeds)
        figures |= {f"{kind}_seed_{seed}": value for seed, value in zip(seeds, final, strict=True)}
        figures |= {f"{kind}_mean": statistics.mean(final), f"{kind}_spread": statistics.stdev(final)}
        figures[f"{kind}_epochs"] = waits
        cells = [f"{value:.1f}" for value in final]
        cells.append(f"{statistics.mean(final):.1f} ± {statistics.stdev(final):.1f}")
        if kind == last:
            cells.append("")
        else:
            differences = [value - curves[last][seed][-1] for seed, value in zip(seeds, final, strict=True)]
            mean, half = statistics.mean(differences), interval(differences)
            figures |= {f"{kind}_difference": mean, f"{kind}_difference_half_interval": half}
            cells.append(f"{mean:+.1f} ± {half:.1f}")
        table.add_row(kind, *cells, f"{waits:.1f}")
    table.caption = (
        f"mean ± standard deviation; difference to {last}, paired by seed, ± half its 95 % confidence interval; epochs"
        f" until {REACHED:g} %"
    )
    console.print(table)
    return figures


def draw_curves(panels: Mapping[str, Curves], path: Path) -> None:
    """Plot top-1 against epochs, one panel for each title: a thin line per seed, a thick one for the mean."""
    from matplotlib import pyplot

    size = (7, 4) if len(panels) == 1 else (5 * len(panels), 4)
    figure, row = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, (title, curves) in zip(row[0], panels.items(), strict=True):
        for kind, runs in curves.items():
            epochs = range(1, len(next(iter(runs.values()))) + 1)
            for accuracies in runs.values():
                axes.plot(epochs, accuracies, color=COLOURS[kind], alpha=0.35, linewidth=0.8)
            mean = [statistics.mean(values) for values in zip(*runs.values(), strict=True)]
            axes.plot(epochs, mean, color=COLOURS[kind], linewidth=2.5, label=f"{kind}, mean of {len(runs)}")
        axes.set(title=title, xlabel="epoch")
        axes.grid(color="0.9")
        axes.legend(loc="lower right")
    row[0][0].set_ylabel("top-1 of the held-out digits, %")
    figure.savefig(path, dpi=120)
    show("curves", path)


def show(name: str, path: Path) -> None:
    """Print the path of a picture."""
    console.print(f"{name:<12} {path}", soft_wrap=True, highlight=False)
