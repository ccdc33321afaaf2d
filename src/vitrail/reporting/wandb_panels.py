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


SECTIONS: dict[str, tuple[Curves, ...]] = {
    "Accuracy": (
        Curves("Top-1 in %, raw and EMA weights", ("val/top1", "val/top1_ema")),
        Curves("Top-5 in %, raw and EMA weights", ("val/top5", "val/top5_ema")),
        Curves("mIoU in %, raw and EMA weights", ("val/mIoU", "val/mIoU_ema")),
        Curves("mAcc in %, raw and EMA weights", ("val/mAcc", "val/mAcc_ema")),
        Curves("aAcc in %, raw and EMA weights", ("val/aAcc", "val/aAcc_ema")),
    ),
    "Losses": (
        Curves("Validation loss, raw and EMA weights", ("val/loss", "val/loss_ema")),
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
    if evaluated := sorted(name for name in logged if re.fullmatch(r"eval/.+/(top1|mIoU)(_ema)?", name)):
        groups["Accuracy"].append(wr.BarPlot(title="Evaluations by eval.py, %", metrics=evaluated))
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


def _browser(wr: ModuleType, name: str) -> Any:
    return wr.MediaBrowser(title=name.replace("_", " ").capitalize(), media_keys=[name], num_columns=1)
