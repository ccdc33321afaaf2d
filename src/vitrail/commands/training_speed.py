"""`train=true`: measure the step of a training, alone or in turns with another one, on one device."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich import box, get_console

from vitrail.runs.config import plain
from vitrail.runs.keys import check_keys
from vitrail.runs.logs import set_up_logging
from vitrail.runs.measured_config import compared, training_config, training_overrides, uses_synthetic
from vitrail.runs.measuring import Figures, MeasuredTraining
from vitrail_runtime.tables import PlainTable

_TIMES = {"data": "data: loader, copies, mixing", "optimizer": "optimiser", "average": "EMA update"}
_MEMORY = {"optimizer": "optimiser state", "average": "EMA weights"}


def measure(config: DictConfig) -> dict[str, float]:
    """Measure the training that the command line describes, and `config.against`; print a table, write `config.json`.

    Returns:
        The figures by name; those of `against` begin with `against_`.

    Raises:
        ConfigError: a setting is invalid, or the training cannot be measured.
    """
    set_up_logging()
    check_keys(config, "benchmark_train")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    overrides = [training_overrides()]
    if config.against is not None:
        against = config.against if isinstance(config.against, str) else plain(config.against)
        overrides.append(compared(overrides[0], against))
    torch.compiler.reset()  # networks that were compiled before count towards its limit
    with tempfile.TemporaryDirectory() as folder:
        trainings = [
            MeasuredTraining(
                training_config(given),
                Path(folder) / str(number),
                config.warmup,
                config.steps,
                uses_synthetic(config, given),
                config.peak,
            )
            for number, given in enumerate(overrides)
        ]
        for _ in range(config.rounds):
            for training in trainings:
                training.run()
    measured = [training.figures() for training in trainings]
    get_console().print(_table(trainings, measured))
    figures = measured[0].named()
    if len(measured) == 2:
        other = measured[1].named()
        figures |= {f"against_{name}": value for name, value in other.items()}
        figures["throughput_over_against"] = figures["images_per_second"] / other["images_per_second"]
    if config.json is not None:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _table(trainings: Sequence[MeasuredTraining], measured: Sequence[Figures]) -> PlainTable:
    """Return a table with a row for each figure, and a column for each training."""
    title = f"training step on {trainings[0].device_name}"
    table = PlainTable(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for training in trainings:
        table.add_column(training.description, justify="right", overflow="fold")
    columns = [_rows(figures) for figures in measured]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    table.caption = (
        "medians of the rounds; the bare loop has network, cross-entropy and optimiser only, on one batch on the device"
    )
    return table


def _rows(figures: Figures) -> dict[str, str]:
    """Return the figures of a training as text, by the labels of their rows."""
    parts = {f"  {_TIMES.get(name, name)}": f"{1e3 * value:.2f}" for name, value in figures.parts.items()}
    memory = {f"  {_MEMORY.get(name, name)}": f"{value / 2**20:,.1f}" for name, value in figures.memory.items()}
    share, bare = figures.share_of_peak, figures.bare
    return {
        "images/s": f"{figures.batch_size / figures.seconds:,.1f}",
        "share of the device's peak": "not known" if share is None else f"{100 * share:.1f} %",
        "ms per step": f"{1e3 * figures.seconds:.2f}",
        **parts,
        "kernel launches per step": "" if figures.launches is None else str(figures.launches),
        "peak memory, MiB": f"{figures.peak_memory / 2**20:,.1f}",
        **memory,
        "bare PyTorch loop, images/s": f"{figures.batch_size / bare:,.1f}" if bare else "",
        "time over the bare loop's": f"{figures.seconds / bare:.3f}" if bare else "",
    }
