"""A W&B report that compares runs of a project: table of results, hyperparameters, curves and pictures."""

import html
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vitrail.errors import ConfigError
from vitrail.reporting.wandb_panels import GROUPS_TABLE, installed_workspaces, panel_groups
from vitrail_runtime.main_metrics import default_metric

METRICS = (
    *("val/top1", "val/top1_ema", "val/top5", "val/top5_ema", "val/mIoU", "val/mIoU_ema", "val/mAcc", "val/aAcc"),
    "speed/images_per_second",
)
_IGNORED = re.compile(r"(^|\.)(paths|run_dir|path|dirpath|last|stop|_target_|skipped_file|id)(\.|$)")
_COLUMNS = 8  # hyperparameters of the parallel coordinates and of the table
_BEST = ("max", "min")  # summaries that logger=wandb defines


class ProjectPath(NamedTuple):
    """A W&B project, and one of its sweeps if the path names one."""

    entity: str
    project: str
    sweep: str | None = None

    @classmethod
    def parse(cls, path: str, key: str = "wandb") -> "ProjectPath":
        """Parse `entity/project`, `entity/project/sweeps/<id>`, or the address of either page.

        Raises:
            ConfigError: it is neither.
        """
        parts = re.sub(r"^https?://[^/]+/|(/workspace)?/?(\?.*)?$", "", path).split("/")
        if all(parts) and (len(parts) == 2 or (len(parts) == 4 and parts[2] == "sweeps")):
            return cls(parts[0], parts[1], parts[3] if len(parts) == 4 else None)
        raise ConfigError(f"{key}={path}: must be <entity>/<project> or <entity>/<project>/sweeps/<id>.")


class RunFigures(NamedTuple):
    """What the report needs of one W&B run."""

    id: str
    name: str
    state: str
    config: dict[str, Any]  # leaves by dotted key
    metrics: dict[str, float]  # best or last value
    accessors: dict[str, str]  # name of each metric in the summary, `val/top1.max` for example
    pictures: list[str]
    hours: float


def write_report(where: ProjectPath, runs: Sequence[str] = (), metric: str | None = None) -> str:
    """Create a report in a W&B project, and return its address.

    Args:
        where: project, and the sweep whose runs to take.
        runs: ids or names of the runs; empty for all of the project or sweep.
        metric: metric that ranks the runs; None for `val/top1`, or `val/mIoU` if no run has it.

    Raises:
        ConfigError: wandb-workspaces is not installed, there are no such runs, none has metrics, or the server refuses.
    """
    _, wr = installed_workspaces()
    figures = fetch_runs(where, runs)
    metric = metric or default_metric({name for run in figures for name in run.metrics})
    measured = [run for run in figures if metric in run.metrics]
    if not measured:
        known = sorted({name for run in figures for name in run.metrics})
        what = f"its metrics are {', '.join(known)}" if known else "no run has logged any metric"
        raise ConfigError(f"metric={metric}: no run of {where.entity}/{where.project} has logged it; {what}.")
    measured.sort(key=lambda run: run.metrics[metric], reverse=not metric.startswith("val/loss"))
    report = wr.Report(
        entity=where.entity,
        project=where.project,
        title=f"{len(measured)} runs of {where.project}"[:128],
        description=f"Compared by {metric}." + (f" Sweep {where.sweep}." if where.sweep else ""),
        blocks=report_blocks(where, measured, figures, metric, narrowed=bool(runs)),
        width="fluid",
    )
    return str(report.save().url)


def fetch_runs(where: ProjectPath, runs: Sequence[str] = ()) -> list[RunFigures]:
    """Fetch the figures of runs from W&B.

    Raises:
        ConfigError: the server refuses, or there are no such runs.
    """
    import wandb

    chosen: list[dict[str, Any]] = [{"sweep": where.sweep}] if where.sweep else []
    if runs:
        chosen.append({"$or": [{key: name} for name in runs for key in ("name", "display_name")]})
    path = f"{where.entity}/{where.project}"
    try:
        found = list(wandb.Api().runs(path, filters={"$and": chosen} if chosen else {}, lazy=False))
    except Exception as error:  # wandb raises its own errors, those of requests, and built-in ones
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"wandb={path}: the server refused or did not answer ({reason[0]}).") from error
    if missing := [name for name in runs if name not in {part for run in found for part in (run.id, run.name)}]:
        raise ConfigError(
            f"runs: {missing[0]} is not a run of {path}" + (f", sweep {where.sweep}." if where.sweep else ".")
        )
    if not found:
        raise ConfigError(f"wandb={path}: has no runs" + (f" in sweep {where.sweep}." if where.sweep else "."))
    return [_figures(run) for run in found]


def _figures(run: Any) -> RunFigures:
    metrics, accessors, pictures = {}, {}, []
    summary = dict(run.summary)
    for name, value in summary.items():
        if isinstance(value, int | float) and "/" in name:
            metrics[name], accessors[name] = float(value), name
        elif hasattr(value, "get"):
            if best := next((word for word in _BEST if isinstance(value.get(word), int | float)), None):
                metrics[name], accessors[name] = float(value.get(best)), f"{name}.{best}"
            elif value.get("_type") in ("images/separated", "image-file", "table-file"):
                pictures.append(name)
    hours = float(summary.get("_runtime") or 0) / 3600
    return RunFigures(run.id, run.name, run.state, _leaves(run.config), metrics, accessors, pictures, hours)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the plain values of nested mappings by dotted key; lists are left out."""
    if hasattr(tree, "items"):
        return {key: leaf for name, part in tree.items() for key, leaf in _leaves(part, f"{prefix}.{name}").items()}
    return {} if isinstance(tree, list) else {prefix.lstrip("."): tree}


def varied_keys(runs: Sequence[RunFigures]) -> list[str]:
    """Return the config keys whose values differ between runs, without paths and ids of single runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not _IGNORED.search(key))
    return [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]


def report_blocks(
    where: ProjectPath, measured: Sequence[RunFigures], runs: Sequence[RunFigures], metric: str, narrowed: bool
) -> list[Any]:
    """Return the blocks of the report.

    Args:
        where: project, and the sweep.
        measured: runs with the metric, best first.
        runs: all runs, those without the metric too.
        metric: metric that ranks the runs.
        narrowed: whether these are single runs, and not all of the project or sweep.
    """
    _, wr = installed_workspaces()
    varied = varied_keys(measured)[:_COLUMNS]
    accessor = measured[0].accessors[metric]
    logged = {name for run in measured for name in run.metrics}
    pictures = list(dict.fromkeys(name for run in measured for name in run.pictures))
    runset = _runset(wr, where, measured if narrowed else [], varied, accessor)
    blocks = [wr.TableOfContents(), wr.H2("Results"), wr.MarkdownBlock(text=results_table(measured, varied, metric))]
    if without := [run for run in runs if run not in measured]:
        names = ", ".join(f"{run.name} ({run.state})" for run in without)
        blocks.append(wr.P(f"Without {metric}, and left out: {names}."))
    comparison = [wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=10))]
    if varied:
        columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=_is_wide(measured, key)) for key in varied]
        columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(accessor), display_name=metric))
        comparison += [
            wr.ParallelCoordinatesPlot(
                columns=columns, title=f"Hyperparameters and {metric}", layout=wr.Layout(w=24, h=10)
            ),
            wr.ParameterImportancePlot(with_respect_to=accessor, layout=wr.Layout(w=24, h=8)),
        ]
    blocks += [wr.H2("Comparison"), wr.PanelGrid(runsets=[runset], panels=comparison)]
    for title, panels in panel_groups(logged, [name for name in pictures if name != GROUPS_TABLE]).items():
        if title != "System":
            blocks += [wr.H2(title), wr.PanelGrid(runsets=[runset], panels=panels)]
    return blocks


def _runset(wr: Any, where: ProjectPath, runs: Sequence[RunFigures], varied: Sequence[str], accessor: str) -> Any:
    """Return the set of runs that panels show: `runs`, or all of the project or sweep if there are none."""
    from wandb_workspaces import expr

    filters = [expr.Metric("Sweep") == where.sweep] if where.sweep else []
    if runs:
        filters.append(expr.Metric("ID").isin([run.id for run in runs]))
    columns = ["run:displayName", f"summary:{accessor}", *(f"config:{_config_accessor(key)}" for key in varied)]
    return wr.Runset(entity=where.entity, project=where.project, name="Runs", filters=filters, pinned_columns=columns)


def _config_accessor(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"{first}.value.{rest}" if rest else f"{first}.value"


def results_table(runs: Sequence[RunFigures], varied: Sequence[str], metric: str) -> str:
    """Return the results as a Markdown table, one row per run."""
    shown = [metric, *(name for name in METRICS if name != metric and any(name in run.metrics for run in runs))]
    header = ["run", *varied, *shown, "hours", "state"]
    lines = [header, ["---"] * (1 + len(varied)) + ["---:"] * (len(shown) + 1) + ["---"]]
    for run in runs:
        values = [f"{run.metrics[name]:.2f}" if name in run.metrics else "" for name in shown]
        chosen = [_plain(run.config.get(key)) for key in varied]
        lines.append([_plain(run.name), *chosen, *values, f"{run.hours:.2f}", run.state])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Return a value as text that Markdown shows as it is."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return html.escape(text).replace("|", "\\|").replace("\n", " ")


def _is_wide(runs: Sequence[RunFigures], key: str) -> bool | None:
    """Return True for positive numbers that span a factor of ten, which need a log scale."""
    values = [run.config.get(key) for run in runs]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return True if len(numbers) == len(values) and min(numbers) > 0 and max(numbers) / min(numbers) >= 10 else None
