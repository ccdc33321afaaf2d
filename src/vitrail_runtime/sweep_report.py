"""Report of a sweep: a table of its jobs, and a figure of the hyperparameters and their importance.

Hydra creates the callback at every start, so matplotlib, Optuna and rich are imported where they are used.
"""

import csv
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vitrail_runtime.main_metrics import default_metric
from vitrail_runtime.sweep_study import importances, is_number, sweep_study, varied


class SweepTable(Callback):
    """Hydra callback that reports a finished sweep as a table and a figure, and exits with 1 if a job failed.

    Args:
        metric: key of the jobs' results that sorts the table, best first; None for `val/top1`, or `val/mIoU` if no job
            has it.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, draw `sweep.png`, and exit with 1 if a job failed."""
        from rich.console import Console

        from vitrail_runtime.tables import PlainTable

        directory = Path(config.hydra.sweep.dir)
        record = directory / "jobs.json"
        if not record.is_file():
            return
        jobs = json.loads(record.read_text())
        metric, largest = self.metric, True
        if "metric" in config.hydra.sweeper:  # a search has its own metric and direction
            metric, largest = config.hydra.sweeper.metric, config.hydra.sweeper.direction == "maximize"
        main = default_metric({key for job in jobs for key in job["results"] or {}})
        metric = metric or main
        for job in jobs:
            if job["status"] == "pruned":
                job["results"] = _best_so_far(Path(job["directory"]), metric, largest)
        sign, worst = (-1 if largest else 1), float("-inf" if largest else "inf")
        differing = varied(jobs)
        table = PlainTable(title=f"{len(jobs)} job{'s' * (len(jobs) > 1)} in {directory}")
        columns = list(dict.fromkeys((metric, main, f"{main}_ema")))
        for name in ("job", *differing, *columns, "seconds", "status"):
            table.add_column(name, overflow="fold")
        for job in sorted(jobs, key=lambda job: sign * (job["results"] or {}).get(metric, worst)):
            values = dict(item.split("=", 1) for item in job["overrides"])
            scores = [_number((job["results"] or {}).get(key)) for key in columns]
            chosen = [_short(values.get(key, "")) for key in differing]
            table.add_row(str(job["number"]), *chosen, *scores, f"{job['seconds']:.0f}", _status(job["status"]))
        Console().print(table)
        if differing:
            _draw(jobs, metric, largest, directory)
        failed = [job for job in jobs if job["status"] not in (0, "pruned")]
        if failed:
            names = ", ".join(f"job {job['number']} ({' '.join(job['overrides'])})" for job in failed)
            print(f"error: {len(failed)} of {len(jobs)} jobs failed: {names}", file=sys.stderr)
            sys.exit(1)


def _draw(jobs: list[dict[str, Any]], metric: str, largest: bool, directory: Path) -> None:
    """Write `sweep.png` and print its path; skipped without Optuna and matplotlib, or with fewer than two results."""
    try:
        figure = sweep_figure(jobs, metric, largest)
    except ImportError:
        return
    if figure is not None:
        figure.savefig(directory / "sweep.png", dpi=110, bbox_inches="tight")
        print(f"figure: {directory / 'sweep.png'}")


def sweep_figure(jobs: list[dict[str, Any]], metric: str, largest: bool = True) -> Any:
    """Draw each job as a line through its values (Optuna's parallel coordinates), with the importance of each key.

    The importance is computed with fANOVA (Hutter et al., ICML 2014) if at least five jobs have finished.

    Args:
        jobs: contents of `jobs.json`: `overrides`, `status` and `results` of each job; for a pruned job, its best
            results so far.
        metric: key of the results.
        largest: whether a larger metric is better.

    Returns:
        matplotlib's figure; None with fewer than two results, or if no key varies.
    """
    import matplotlib
    import optuna
    from matplotlib import pyplot

    matplotlib.use("Agg")
    study, names, finished = sweep_study(jobs, metric, largest)
    if study is None:
        return None
    early = sum(job.get("status") == "pruned" for job in finished)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that these functions are experimental
        axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study, params=names, target_name=metric)
        figure = axes.figure
        figure.set_size_inches(3 + 2.2 * len(names), 4.8)
        title = f"{len(finished)} jobs" + (f", {early} of them pruned" if early else "")
        axes.set_title(f"{title}; the best {study.best_value:.4g}")
        if shares := importances(study, finished):
            text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            figure.text(0.5, -0.09, f"importance: {text}", ha="center", va="top")
    pyplot.close(figure)
    return figure


def epochs_of(file: Path, metric: str | None) -> list[float]:
    """Return a metric of each epoch from a metrics.csv file; None for its main metric."""
    with file.open(newline="", encoding="utf-8") as text:
        rows = csv.DictReader(text)
        name = metric or default_metric(rows.fieldnames or ())
        return [float(row[name]) for row in rows if row.get(name)]


def _best_so_far(directory: Path, metric: str, largest: bool) -> dict[str, float] | None:
    file = directory / "metrics.csv"
    values = epochs_of(file, metric) if file.is_file() else []
    return {metric: max(values) if largest else min(values)} if values else None


def _status(status: int | str) -> Any:
    from rich.text import Text

    if status == 0:
        return "done"
    return "ended early" if status == "pruned" else Text(f"failed ({status})", "red")


def _short(value: str) -> str:
    """Shorten a sampled number to a few digits."""
    return f"{float(value):.4g}" if "." in value and is_number(value) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
