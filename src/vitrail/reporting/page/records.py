"""Find runs, and read their directories; a file that is missing or damaged does not spoil the others."""

import csv
import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitrail.errors import ConfigError
from vitrail.reporting.page.history import History, read_history
from vitrail_runtime.names import readable

_NOT_RUNS = {"checkpoints", "wandb", "export", "tensorboard", "mlruns"}  # folders within a run
_FILES = ("config.yaml", "metrics.csv", "results.json", "overrides.txt", "skipped.txt")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the compiled one is ten times as fast


def parse_yaml(text: str) -> Any:
    """Return what a YAML text contains.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _LOADER)


def load_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it contains something else.
        yaml.YAMLError: it is not YAML.
    """
    saved = parse_yaml(file.read_text(encoding="utf-8"))
    if not isinstance(saved, dict):
        raise ValueError("not a mapping")
    return saved


@dataclass
class RunRecord:
    """One run.

    Attributes:
        path: run directory.
        name: name on the page.
        sweep: name of the sweep that it is a job of; None for a single run.
        status: `finished`, `running`, `failed`, `pruned`, `stopped` before its last epoch, or `unknown` where it cannot
            be told whether it is still running.
        sentence: why it failed.
        problems: files that are missing or damaged, one sentence each.
        config: config with the run directory written as `<run>`.
        overrides: overrides of its command line, with those that a resume changed or added; None if they are not known.
        metrics: columns of metrics.csv, one value per epoch; None where there is no finite number.
        results: contents of results.json.
    """

    path: Path
    name: str
    sweep: str | None = None
    status: str = "stopped"
    sentence: str = ""
    problems: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=lambda: History([], []))
    skipped: list[str] = field(default_factory=list)

    @property
    def is_command_known(self) -> bool:
        """Whether `overrides` are all that the run was started with."""
        return self.overrides is not None and not any(item.startswith("resume=") for item in self.overrides)

    @property
    def planned_epochs(self) -> float | None:
        """Number of epochs of the config; None if it is not known."""
        planned = self.config.get("epochs")
        return planned if _is_number(planned) else None

    @property
    def epochs(self) -> int:
        """Number of finished epochs."""
        return len(self.metrics.get("epoch", ()))

    @property
    def seconds(self) -> float | None:
        """Seconds of training, of all processes after one another."""
        return self.history.seconds or self.results.get("seconds")

    @property
    def images_per_second(self) -> float | None:
        """Median throughput of the epochs."""
        speeds = [value for value in self.metrics.get("speed/images_per_second", ()) if value is not None]
        return statistics.median(speeds) if speeds else self.results.get("images_per_second")

    def best(self, metric: str) -> float | None:
        """Return the best value of a metric; None if it has none."""
        values = [value for value in self.metrics.get(metric, ()) if value is not None]
        return (max if is_larger_better(metric) else min)(values, default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_larger_better(metric: str) -> bool:
    """Return whether a metric is better if it is larger."""
    return "loss" not in metric and "error" not in metric


def find_runs(where: Sequence[str]) -> list[Path]:
    """Return the run directories in folders, at any depth, sorted by path; a folder may be a run itself.

    Args:
        where: folders, or patterns of folders such as `logs/train/runs/2026-11-*`.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    found: set[Path] = set()
    for name in where:
        folders = _folders(name)
        if not folders:
            raise ConfigError(f"runs={name}: no such folder; set it to a run, a sweep, or a folder that contains some.")
        inside = {path for folder in folders for path in _runs_below(folder)}
        if not inside:
            raise ConfigError(
                f"runs={name}: contains no run of train.py (a folder with a config.yaml and a train.log)."
            )
        found |= inside
    return sorted(found, key=_by_number)


def common_folder(where: Sequence[str]) -> Path:
    """Return the folder that contains the folders of `find_runs`, to which names of runs are relative."""
    folders = [folder for name in where for folder in _folders(name)]
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders or [Path.cwd()]))


def _folders(name: str) -> list[Path]:
    path = Path(name).expanduser().absolute()
    matching = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return [path] if path.is_dir() else sorted(found for found in matching if found.is_dir())


def _runs_below(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        jobs = _jobs(Path(folder)) if "jobs.json" in files else {}
        found += [Path(folder) / str(number) for number in jobs]
        if _is_run({*files}):
            found.append(Path(folder))
            folders.clear()
        folders[:] = [name for name in folders if name not in _NOT_RUNS and not name.startswith(".")]
    return [path for path in found if path.is_dir()]


def _is_run(files: set[str]) -> bool:
    return bool(files & {"metrics.csv", "train.log", "config.yaml"}) and "eval.log" not in files


def _by_number(path: Path) -> tuple[Any, ...]:
    """Sort the jobs of a sweep by number."""
    return path.parent, (0, int(path.name), "") if path.name.isdigit() else (1, 0, path.name)


def _jobs(sweep: Path) -> dict[int, dict[str, Any]]:
    """Return the jobs of a sweep by number; none if its record is damaged."""
    try:
        jobs = {int(job["number"]): job for job in json.loads((sweep / "jobs.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    good = all(isinstance(job.get("overrides", []), list) for job in jobs.values())
    return {number: {**job, "overrides": [*map(str, job.get("overrides", []))]} for number, job in jobs.items() if good}


def signature(path: Path) -> tuple[Any, ...]:
    """Return a value that changes whenever a file of a run changes."""
    files = [*(path / name for name in _FILES), *sorted(path.glob("[!.]*.png"))]
    files += [*path.glob("*.log"), path.parent / "jobs.json"]
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())


def read_run(
    path: Path,
    root: Path,
    is_claimed: Callable[[Path], bool | None],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
) -> RunRecord:
    """Read the directory of a run.

    Args:
        path: run directory.
        root: folder that the run's name is relative to.
        is_claimed: whether a process is training in a directory; None if that is not known.
        upgrade: converts the config of an earlier version.
    """
    name = path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name
    run = RunRecord(path, readable(name))
    job = _jobs(path.parent).get(int(path.name)) if path.name.isdigit() else None
    if job is not None:
        run.sweep = path.parent.name
    missing = []
    for part, read in _PARTS.items():
        try:
            read(run, path / part)
            if part == "config.yaml":
                run.config = upgrade(run.config)
        except FileNotFoundError:
            missing.append(part)
        except Exception as error:  # a damaged file can hold anything
            run.problems.append(f"{part}: cannot be read ({_first_line(error)})")
    if missing:
        run.problems.append(f"{', '.join(missing)}: missing")
    logs = [path / f"{run.config.get('task', 'train')}.log", *sorted(path.glob("*.log"))]
    try:
        run.history = read_history(next((log for log in logs if log.is_file()), logs[0]))
    except (OSError, ValueError) as error:
        run.problems.append(f"{logs[0].name}: cannot be read ({_first_line(error)})")
    if not run.metrics and not any("metrics.csv" in problem for problem in run.problems):
        run.problems.append("metrics.csv: has no finished epoch")
    if job is not None and job["overrides"]:
        run.overrides = job["overrides"]
    run.status, run.sentence = _status(run, job, is_claimed(path))
    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _status(run: RunRecord, job: dict[str, Any] | None, claimed: bool | None) -> tuple[str, str]:
    if claimed:
        return "running", ""
    code = 0 if job is None else job.get("status", 0)
    if code == "pruned":
        return "pruned", ""
    if (failure := run.history.failure) is not None:
        return "failed", failure
    planned = run.planned_epochs
    if run.results and (planned is None or run.results.get("epochs", planned) >= planned):
        return "finished", ""
    if code not in (0, 143):  # 128 + SIGTERM: stopped, to be resumed
        return "failed", _console_error(run.path) or f"exit status {code}"
    return ("unknown" if claimed is None else "stopped"), ""


def _console_error(path: Path) -> str:
    """Return the last error that a job of a sweep printed; empty if its output was not kept."""
    try:
        lines = (path / "console.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def _read_config(run: RunRecord, file: Path) -> None:
    saved = load_yaml(file)
    before = str((saved.get("paths") or {}).get("run") or run.path)
    run.config = _replaced(saved, before)


def _replaced(tree: Any, run_dir: str) -> Any:
    """Write the run directory as `<run>`, so that it is no difference between runs."""
    if isinstance(tree, dict):
        return {str(key): _replaced(value, run_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replaced(value, run_dir) for value in tree]
    return tree.replace(run_dir, "<run>") if isinstance(tree, str) else tree


def _read_metrics(run: RunRecord, file: Path) -> None:
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        if "epoch" not in header:
            raise ValueError("no column epoch")
        table = list(rows)
    good = [row for row in (_numbers(cells, header) for cells in table) if row is not None]
    if len(good) < len(table):
        run.problems.append(f"metrics.csv: {len(table) - len(good)} of {len(table)} rows are damaged and left out")
    if good:
        run.metrics = {name: [row[column] for row in good] for column, name in enumerate(header)}


def _numbers(cells: Sequence[str], header: Sequence[str]) -> list[float | None] | None:
    """Return the numbers of a row, None for those that are missing or not finite; None if the row is damaged."""
    if len(cells) != len(header):
        return None
    try:
        values = [float(cell) if cell else None for cell in cells]
    except ValueError:
        return None
    if values[header.index("epoch")] is None:
        return None
    return [None if value is None or value - value != 0 else value for value in values]


def _read_results(run: RunRecord, file: Path) -> None:
    if file.is_file():  # written at the end of a training
        results = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise ValueError("not a mapping")
        for name in ("epochs", "seconds", "images_per_second"):
            if not _is_number(results.get(name, 0)):
                raise ValueError(f"{name} is not a number")
        run.results = results


def _read_overrides(run: RunRecord, file: Path) -> None:
    starts = re.split(r"^# resumed.*$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    first, *resumed = ([line for line in start.splitlines() if line] for start in starts)
    changed = (item for start in resumed for item in start if not item.startswith("resume="))
    run.overrides = list({item.partition("=")[0]: item for item in (*first, *changed)}.values())


def _read_versions(run: RunRecord, file: Path) -> None:
    run.versions = load_yaml(file)


def _read_skipped(run: RunRecord, file: Path) -> None:
    if file.is_file():
        run.skipped = list(dict.fromkeys(file.read_text(encoding="utf-8", errors="replace").splitlines()))


_PARTS: dict[str, Callable[[RunRecord, Path], None]] = {
    "config.yaml": _read_config,
    "overrides.txt": _read_overrides,
    "versions.yaml": _read_versions,
    "metrics.csv": _read_metrics,
    "results.json": _read_results,
    "skipped.txt": _read_skipped,
}
