"""Render the report page: data and pictures as JSON in one HTML file, drawn by page/*.js (37 kB, no library).

Texts of runs reach the page as JSON, and the scripts insert them as text, so that names with HTML in them are shown.
The page's content security policy allows only its own script, and no network.
"""

import base64
import hashlib
import html
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from vitrail.reporting.page.compare import differing, groups
from vitrail.reporting.page.evaluations import read_evaluation
from vitrail.reporting.page.records import RunRecord, is_larger_better
from vitrail_runtime.invocation import shown_command
from vitrail_runtime.main_metrics import MAIN_METRICS

_SCRIPTS = ("base.js", "table.js", "axes.js", "curves.js", "sweep.js", "run.js", "main.js")
_PICTURES = ("first_batch.png", "label_maps.png", "predictions.png", "attention.png")
_PICTURE_SERIES = "[!.]*_over_epochs.png"
_PICTURE_BYTES = 6 << 20  # all pictures of a page, as base64
_MOST_NUMBERS = 1_500_000  # of all curves; longer ones are thinned, so that the page stays below 20 MB
_SIDE = 1200  # pixels of the longer side of a picture


def render_page(
    runs: Sequence[RunRecord],
    metric: str,
    title: str,
    evaluations: Mapping[Path, Path] | None = None,
    reload_seconds: float | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        runs: runs, in the order of the table.
        metric: column that ranks the runs.
        title: title of the page.
        evaluations: directory of the evaluation of each run directory that has one.
        reload_seconds: seconds after which the page loads itself again; None for a finished page.
    """
    data = {
        "title": title,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "reload": reload_seconds,
        "metric": metric,
        "larger": is_larger_better(metric),
        "others": other_metrics(runs, metric),
        "columns": [column._asdict() for column in differing(runs)],
        "groups": groups(runs, metric),
        "runs": _entries(runs, metric, evaluations or {}),
    }
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    script = f'"use strict";(() => {{\n{script}\n}})();'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<script type="application/json" id="data">{_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


@lru_cache
def _asset(name: str) -> str:
    return (resources.files("vitrail.reporting.page") / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """Return JSON that cannot end the script element it is in."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c")


def _finite(tree: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by text."""
    if isinstance(tree, dict):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and tree - tree != 0 else tree


def _entries(runs: Sequence[RunRecord], metric: str, evaluations: Mapping[Path, Path]) -> list[dict[str, Any]]:
    numbers = sum(len(column) for run in runs for column in run.metrics.values())
    step = -(-numbers // _MOST_NUMBERS) or 1
    others = other_metrics(runs, metric)
    entries = [_entry(run, metric, others, step, evaluations.get(run.path)) for run in runs]
    sign = 1 if is_larger_better(metric) else -1
    order = sorted(range(len(runs)), key=lambda index: -sign * (runs[index].best(metric) or -sign * 1e30))
    left = _PICTURE_BYTES
    for index in order:  # the best runs first, so that theirs fit
        for entry in (entries[index], *entries[index]["evaluations"]):
            for name, file in list(entry["pictures"].items()):
                encoded = _picture(file, file.stat().st_mtime_ns) if left > 0 and file.is_file() else None
                entry["pictures"][name] = {"file": str(file), "data": encoded}
                left -= len(encoded or "")
    return entries


def _pictures(run: Path) -> dict[str, Path]:
    """Return the pictures that a training has written, by name."""
    files = [path for name in _PICTURES if (path := run / name).is_file()]
    return {path.stem: path for path in (*files, *sorted(run.glob(_PICTURE_SERIES)))}


def other_metrics(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """Return the main metrics that some runs have, without the one that ranks them."""
    return [name for name in MAIN_METRICS if name != metric and any(name in run.metrics for run in runs)]


def _entry(run: RunRecord, metric: str, others: Sequence[str], step: int, evaluation: Path | None) -> dict[str, Any]:
    """Return what the page knows of a run; pictures are files here."""
    results, problems = read_evaluation(evaluation) if evaluation else ([], [])
    ema = None if metric.endswith("_ema") else run.best(f"{metric}_ema")
    train = shown_command("train")
    return {
        "name": run.name,
        "path": str(run.path),
        "status": run.status,
        "sentence": run.sentence,
        "problems": [*run.problems, *problems],
        "best": _short(run.best(metric)),
        "best_ema": _short(ema),
        "others": {name: _short(run.best(name)) for name in others},
        "epochs": run.epochs,
        "planned": run.planned_epochs,
        "hours": None if run.seconds is None else round(run.seconds / 3600, 4),
        "speed": _short(run.images_per_second),
        "metrics": {name: _thinned(column, step) for name, column in run.metrics.items() if name != "step"},
        "config": run.config,
        "has_config": bool(run.config),
        "command": f"{train} {shlex.join(run.overrides or ())}".strip() if run.is_command_known else None,
        "reproduce": f"{train} reproduce={shlex.quote(str(run.path))}",
        "versions": run.versions,
        "skipped": run.skipped[:500],
        "skipped_count": len(run.skipped),
        "events": [list(event) for event in run.history.events],
        "stretches": [list(stretch) for stretch in run.history.stretches],
        "pictures": _pictures(run.path),
        "evaluations": results,
    }


def _thinned(column: list[float | None], step: int) -> list[float | None]:
    """Return every `step`-th value, counted from the last one, with five digits."""
    return [_short(value) for value in column[::-1][::step][::-1]]


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


@lru_cache(maxsize=2048)
def _picture(file: Path, _: int) -> str | None:
    """Return a picture as the base64 of a smaller JPEG; None if it cannot be read. The date renews the cache."""
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
    except Exception:  # Pillow raises many kinds of exceptions for damaged files
        return None
    small.thumbnail((_SIDE, _SIDE))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode()
