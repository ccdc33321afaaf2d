"""What a run's log file says about its history: starts, stops, failures and skipped steps.

Times are seconds since 1970, from the log's local times.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.errors import ArgumentError, ConfigError, ImageError, TrainingError

_OWN_ERRORS = {kind.__name__ for kind in (ArgumentError, ConfigError, ImageError, TrainingError)}
_MOST_BYTES = 8 << 20  # of a log file; older records are left out
_RECORD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (\w+) ([\w.]+): (.*)")
_EPOCH = re.compile(r"epoch (\d+)/(\d+|None)")


class Event(NamedTuple):
    """One thing that happened."""

    time: float
    kind: str
    """`start`, `resume`, `preempted`, `failed` or `warning`."""
    text: str


class Stretch(NamedTuple):
    """One process of a training, from its start to its last log record."""

    start: float
    end: float
    first: int | None
    """First finished epoch, counted from 1; None if it finished none."""
    last: int | None
    """Last finished epoch."""
    ending: str
    """`preempted`, `failed`, or empty: it finished, is running, or was killed."""


class History(NamedTuple):
    """History of a run."""

    events: list[Event]
    stretches: list[Stretch]

    @property
    def failure(self) -> str | None:
        """The error that ended the last process, in one sentence; None if it did not fail."""
        last = next((event for event in reversed(self.events) if event.kind != "warning"), None)
        return last.text if last is not None and last.kind == "failed" else None

    @property
    def seconds(self) -> float:
        """Seconds in which a process trained."""
        return sum(stretch.end - stretch.start for stretch in self.stretches)


def read_history(log: Path) -> History:
    """Read the history of a run from its log file; empty without one.

    Raises:
        OSError: the file cannot be read.
    """
    events: list[Event] = []
    stretches: list[dict[str, Any]] = []
    for time, level, logger, message, trace in _records(log):
        kind, text = _kind(level, logger, message, trace, started=bool(stretches))
        if kind in ("start", "resume") or not stretches:
            stretches.append({"start": time, "first": None, "last": None, "ending": ""})
        stretch = stretches[-1]
        stretch["end"] = time
        if kind:
            events.append(Event(time, kind, text))
        if kind in ("preempted", "failed"):
            stretch["ending"] = kind
        if logger == "vitrail.training.callbacks" and (found := _EPOCH.match(message)):
            stretch["last"] = int(found[1])
            stretch["first"] = stretch["first"] or stretch["last"]
    return History(events, [Stretch(**stretch) for stretch in stretches])


def _records(log: Path) -> Iterator[tuple[float, str, str, str, list[str]]]:
    """Yield time, level, logger, message and following lines of each record."""
    if not log.is_file():
        return
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _MOST_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    record: tuple[float, str, str, str, list[str]] | None = None
    for line in lines:
        if found := _RECORD.match(line):
            if record:
                yield record
            time = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(found[2]) / 1000
            record = (time, found[3], found[4], found[5], [])
        elif record:
            record[4].append(line)
    if record:
        yield record


def _kind(level: str, logger: str, message: str, trace: list[str], started: bool) -> tuple[str, str]:
    """Return kind and text of a record's event; both empty if it is none."""
    if logger == "vitrail.commands.train" and message.startswith("run directory "):
        return ("resume", "resumed") if started else ("start", "started")
    if logger == "vitrail.commands.train" and message.startswith("stopped by "):
        return "preempted", message.partition(";")[0]
    if logger == "vitrail" and message == "failed":
        return "failed", _last_error(trace)
    if level == "WARNING" and logger == "vitrail.training.nonfinite_guard":
        return "warning", message
    return "", ""


def _last_error(trace: list[str]) -> str:
    """Return the last error of a traceback in one line."""
    starts = [line for line in trace if re.match(r"[A-Za-z_][\w.]*(: |$)", line)]
    name, _, message = (starts[-1] if starts else "unknown error").partition(": ")
    short = name.rpartition(".")[2]
    return message if short in _OWN_ERRORS and message else f"{short}: {message}".removesuffix(": ")
