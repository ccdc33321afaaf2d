"""Write a page that compares runs."""

import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitrail.errors import ConfigError
from vitrail.reporting.page import (
    RunRecord,
    common_folder,
    find_evaluations,
    find_runs,
    read_run,
    render_page,
    signature,
)
from vitrail.reporting.tables import counted, near, size_words
from vitrail.runs.directory import is_claimed
from vitrail.runs.keys import check_keys
from vitrail.runs.logs import set_up_logging
from vitrail_runtime.main_metrics import default_metric
from vitrail_runtime.renames import upgraded

log = logging.getLogger(__name__)


def report(config: DictConfig) -> Path:
    """Write the page that `config` describes, and return its file; with `live=true`, keep it up to date until Ctrl-C.

    Raises:
        ConfigError: there are no runs, none of them has the metric, or the file cannot be written.
    """
    set_up_logging()
    check_keys(config, "report")
    out = Path(config.out).expanduser()
    reader = _Reader(config)
    _write(out, reader, config.interval if config.live else None, first=True)
    log.info("%s: %s, %s", near(out), counted(len(reader.runs), "run"), size_words(out.stat().st_size))
    if config.live:
        log.info("open file://%s; it reloads itself every %g s. Press Ctrl-C to stop.", out.absolute(), config.interval)
        try:
            while True:
                time.sleep(config.interval)
                if reader.read():
                    _write(out, reader, config.interval)
        except KeyboardInterrupt:
            reader.read()
            _write(out, reader, None)
    return out


class _Reader:
    """Reader of the runs in a folder, which reads again only those that changed."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.where = [config.runs] if isinstance(config.runs, str) else [*config.runs]
        self.root = common_folder(self.where)
        self.runs: list[RunRecord] = []
        self.evaluations: dict[Path, Path] = {}
        self._known: dict[Path, tuple[Any, RunRecord]] = {}
        self.read()

    def read(self) -> bool:
        """Read what changed, and return whether anything did.

        Raises:
            ConfigError: there are no runs.
        """
        known: dict[Path, tuple[Any, RunRecord]] = {}
        for path in find_runs(self.where):
            state = (signature(path), is_claimed(path))
            before = self._known.get(path)
            if before is not None and before[0] == state:
                known[path] = before
            else:
                known[path] = (state, read_run(path, self.root, is_claimed, upgraded))
        runs = [run for _, run in known.values()]
        evaluations = self._find_evaluations(runs)
        same = known == self._known and evaluations == self.evaluations
        self._known, self.runs, self.evaluations = known, runs, evaluations
        return not same

    def _find_evaluations(self, runs: list[RunRecord]) -> dict[Path, Path]:
        """Return the evaluation of each run, from `evaluations` or from where eval.py writes by default."""
        paths = [run.path for run in runs]
        if self.config.evaluations is not None:
            folder = Path(self.config.evaluations).expanduser()
            if not folder.is_dir():
                raise ConfigError(f"evaluations={self.config.evaluations}: no such folder.")
            return find_evaluations(folder, paths)
        logs = {Path(str((run.config.get("paths") or {}).get("logs"))) / "eval" for run in runs}
        logs |= {path.parents[1].parent / "eval" for path in paths if len(path.parents) > 2}
        return {
            run: found
            for folder in sorted(logs)
            if folder.is_dir()
            for run, found in find_evaluations(folder, paths).items()
        }


def _write(out: Path, reader: _Reader, reload_seconds: float | None, first: bool = False) -> None:
    """Write the page atomically; the first time, also log what is wrong with runs."""
    columns = sorted({name for run in reader.runs for name in run.metrics} - {"epoch", "step"})
    metric = reader.config.metric or default_metric(columns)
    if metric not in columns and (columns or reader.config.metric):
        advice = f"choose from {', '.join(columns)}" if columns else "no run has finished an epoch"
        raise ConfigError(f"metric={metric}: no run has this column; {advice}.")
    if first:
        for run in reader.runs:
            for problem in run.problems:
                log.warning("%s: %s", run.name, problem)
    text = render_page(reader.runs, metric, reader.root.name, reader.evaluations, reload_seconds)
    unfinished = out.with_name(f".{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        unfinished.replace(out)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}).") from error
