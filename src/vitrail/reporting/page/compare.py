"""What differs between the configs of runs, and which values of a sweep matter."""

import re
from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

from yaml import YAMLError

from vitrail.reporting.page.records import RunRecord, is_larger_better, parse_yaml
from vitrail_runtime.sweep_study import importances, sweep_study, varied

_NOT_COMPARED = ("paths.", "resume", "reproduce", "hydra.")
_MOST_SHOWN = 8  # columns that the table shows at first


class Column(NamedTuple):
    """A config key whose values differ."""

    key: str
    values: list[Any]
    """One per run; None where the run does not have the key."""
    shown: bool
    """Whether the table shows it at first."""


def differing(runs: Sequence[RunRecord]) -> list[Column]:
    """Return the config keys whose values differ between runs; those of their command lines come first."""
    leaves = [_leaves(run.config) for run in runs]
    overrides = [_overrides(run) for run in runs]
    named = list(dict.fromkeys(key for some in overrides for key in some))
    configured = sorted({key for some in leaves for key in some})
    # Of a group that is none, the config has null, and the command line its name.
    both = [
        over | {key: value for key, value in leaf.items() if value is not None or key not in over}
        for leaf, over in zip(leaves, overrides, strict=True)
    ]
    known = [bool(run.config or run.overrides) for run in runs]  # not those that failed before they wrote it
    first = [_column(key, [values.get(key) for values in both], known) for key in named]
    readable = [bool(run.config) for run in runs]
    rest = [_column(key, [leaf.get(key) for leaf in leaves], readable) for key in configured if key not in named]
    chosen = [column for column in first if column] or [column for column in rest if column]
    shown = {column.key for column in chosen[:_MOST_SHOWN]}
    return [column._replace(shown=column.key in shown) for column in (*first, *rest) if column]


def _column(key: str, values: list[Any], known: Sequence[bool]) -> Column | None:
    """Return the column of a key; None if the values of the known runs are equal, or the key is not compared."""
    compared = list(compress(values, known))
    if f"{key}.".startswith(_NOT_COMPARED) or all(value == compared[0] for value in compared):
        return None
    return Column(key, values, False)


def _overrides(run: RunRecord) -> dict[str, Any]:
    """Return the values of a command line by key, as the config would have them."""
    items = [item for item in run.overrides or () if not item.startswith(("~", "hydra"))]
    return {key: _parsed(value) for key, _, value in (item.lstrip("+").partition("=") for item in items)}


def _parsed(text: str) -> Any:
    if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text, re.IGNORECASE):  # 1e-3 is text for YAML
        return float(text)
    try:
        return _leaf(parse_yaml(text))
    except YAMLError:
        return text


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a config by dotted key; lists as text."""
    if isinstance(tree, dict) and tree:
        return {
            key: value
            for name, branch in tree.items()
            for key, value in _leaves(branch, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: _leaf(tree)}


def _leaf(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)


def groups(runs: Sequence[RunRecord], metric: str) -> list[dict[str, Any]]:
    """Return the sweeps among the runs: name, indices of the runs, keys that vary, and the importance of each.

    Without Optuna there are no importances. Single runs are not in any group.
    """
    found = []
    for name in dict.fromkeys(run.sweep for run in runs if run.sweep):
        members = [index for index, run in enumerate(runs) if run.sweep == name]
        jobs = [_job(runs[index], metric) for index in members]
        keys = varied(jobs)
        if keys:
            found.append({"name": name, "runs": members, "keys": keys, "importance": _importance(jobs, metric)})
    return found


def _job(run: RunRecord, metric: str) -> dict[str, Any]:
    best = run.best(metric)
    finished = run.status in ("finished", "pruned") and best is not None
    overrides = [item for item in run.overrides or () if "=" in item and not item.startswith("resume=")]
    return {"overrides": overrides, "results": {metric: best} if finished else None, "status": run.status}


def _importance(jobs: list[dict[str, Any]], metric: str) -> dict[str, float]:
    try:
        study, _, finished = sweep_study(jobs, metric, is_larger_better(metric))
    except ImportError:
        return {}
    return {} if study is None else importances(study, finished)
