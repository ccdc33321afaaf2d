"""W&B panels of what a run has logged: sections of a workspace, and grids of a report.

A panel is made only if a metric or picture that it shows has been logged, so that none is empty.
"""

import re
from collections.abc import Collection
from types import ModuleType
from typing import Any, NamedTuple

from vitrail.errors import ConfigError

EPOCH = "epoch"
GROUPS_TABLE = "optimizer_groups"


class Curves(NamedTuple):
    """Lines of one panel."""

    title: str
    metrics: tuple[str, ...]
    pattern: str | None = None
    """Regular expression that also matches what other runs of the project may log; shown instead of `metrics`."""


def _raw_and_ema(title: str, name: str) -> Curves:
    return Curves(f"{title}, raw and EMA weights", (name, f"{name}_ema"), f"^{name}(_ema)?$")


SECTIONS: dict[str, tuple[Curves, ...]] = {
    "Accuracy": (
        _raw_and_ema("Top-1 in %", "val/top1"),
        _raw_and_ema("Top-5 in %", "val/top5"),
        _raw_and_ema("mIoU in %", "val/mIoU"),
        _raw_and_ema("mAcc in %", "val/mAcc"),
        _raw_and_ema("aAcc in %", "val/aAcc"),
    ),
    "Losses": (
        _raw_and_ema("Validation loss", "val/loss"),
        Curves("Training loss and its parts", ("train/loss",), "train/.*loss"),
    ),
    "Optimiser": (
        Curves("Learning rate", ("train/lr",)),
        Curves("Gradient norm before clipping", ("train/grad_norm",)),
    ),
    "Throughput": (
        Curves("Images per second, all devices", ("speed/images_per_second",)),
        Curves("Waiting for data, % of the time", ("speed/data_wait",)),
        Curves("Peak GPU memory in GiB", ("speed/gpu_memory",)),
        Curves("Share of the GPU's peak, %", ("speed/share_of_peak",)),
    ),
}
PATTERNS = frozenset(curves.pattern for section in SECTIONS.values() for curves in section if curves.pattern)

_SYSTEM = (
    Curves("Processor in %", ("system/cpu",)),
    Curves("Main memory in %", ("system/memory_percent",)),
    Curves("Memory of the process in MB", ("system/proc.memory.rssMB",)),
)
_SYSTEM_GPU = (("GPU in %", "gpu"), ("GPU memory in %", "memoryAllocated"), ("GPU power in W", "powerWatts"))


def installed_workspaces() -> tuple[ModuleType, ModuleType]:
    """Return the modules of wandb-workspaces for workspaces and for reports.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise ConfigError("wandb-workspaces is not installed; run pip install 'vitrail[wandb]'.") from error
    return workspaces, reports


def panel_groups(logged: Collection[str], pictures: Collection[str], num_gpus: int = 0) -> dict[str, list[Any]]:
    """Return W&B panels by section, without sections that would be empty.

    Args:
        logged: names of the logged metrics.
        pictures: names of the logged pictures and tables.
        num_gpus: GPUs of the machine, for the system section.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    _, wr = installed_workspaces()
    groups = {
        title: [panel for curves in section if (panel := _line_plot(wr, curves, logged))]
        for title, section in SECTIONS.items()
    }
    groups["Accuracy"] += _evaluations(wr, logged)
    if GROUPS_TABLE in pictures:
        groups["Optimiser"].append(wr.WeavePanelSummaryTable(table_name=GROUPS_TABLE))
    names = [name for name in pictures if name != GROUPS_TABLE]
    groups["Pictures"] = [_browser(wr, name) for name in names]
    groups["System"] = system_panels(wr, num_gpus)
    return {title: panels for title, panels in groups.items() if panels}


def system_panels(wr: ModuleType, num_gpus: int) -> list[Any]:
    """Return panels of the figures that W&B itself samples, by time; `wr` is wandb-workspaces' module of reports."""
    gpus = [
        Curves(title, tuple(f"system/gpu.{index}.{name}" for index in range(num_gpus))) for title, name in _SYSTEM_GPU
    ]
    return [
        wr.LinePlot(title=curves.title, x="RelativeTime(Process)", y=list(curves.metrics))
        for curves in (*_SYSTEM, *gpus)
        if curves.metrics
    ]


def _line_plot(wr: ModuleType, curves: Curves, logged: Collection[str]) -> Any:
    """Return the panel of some curves; None if none of them has been logged."""
    shown = [name for name in curves.metrics if name in logged]
    if not shown:
        return None
    lines = {"y": shown} if curves.pattern is None else {"metric_regex": curves.pattern}
    return wr.LinePlot(title=curves.title, x=EPOCH, **lines)


def _evaluations(wr: ModuleType, logged: Collection[str]) -> list[Any]:
    """Return a panel for each data that `eval.py` has logged results of."""
    found: dict[str, list[str]] = {}
    for name in sorted(logged):
        if match := re.fullmatch(r"eval/(.+)/(top1|mIoU)(_ema)?", name):
            found.setdefault(match[1], []).append(name)
    return [wr.BarPlot(title=f"Evaluation on {data}, %", metrics=names) for data, names in found.items()]


def _browser(wr: ModuleType, name: str) -> Any:
    return wr.MediaBrowser(title=name.replace("_", " ").capitalize(), media_keys=[name], num_columns=1)
