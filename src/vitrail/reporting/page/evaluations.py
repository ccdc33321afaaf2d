"""Find the evaluations of runs that `eval.py` wrote, and read their results for the page."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vitrail.data.sampling import sample_of
from vitrail.reporting.evaluation import BINS
from vitrail.reporting.page.records import load_yaml
from vitrail.reporting.tables import describe

_MOST_PAIRS = 200  # confused pairs that the page lists
_MOST_OVERLAYS = 8  # images with their masks that the page shows


def find_evaluations(folder: Path, runs: Iterable[Path]) -> dict[Path, Path]:
    """Return the latest evaluation of each run that has one.

    Args:
        folder: folder of evaluations, searched at any depth.
        runs: run directories.
    """
    known = {path.resolve(): path for path in runs}
    found: dict[Path, Path] = {}
    for config in sorted(folder.rglob("config.yaml")):  # directories sort by start time
        try:
            saved = load_yaml(config)
            task, ckpt = saved["task"], Path(saved["ckpt"]).resolve()
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue  # unfinished, or of other weights
        run = next((known[parent] for parent in (ckpt.parent, *ckpt.parents[1:2]) if parent in known), None)
        if run is not None and task == "eval" and (config.parent / "results.json").is_file():
            found[run] = config.parent
    return found


def read_evaluation(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the results of each set of weights, and a sentence for each file that cannot be read.

    Each result has `weights`, `summary` and `pictures` (files by name). A classifier's has `calibration` (for each bin
    of confidence with images: mean confidence, accuracy, and their number), `classes` and `pairs`, a segmentation
    network's `ious` (class, IoU and accuracy in %; None where they are not defined).
    """
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        sets = {str(weights): dict(summary) for weights, summary in results.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [], [f"{folder.name}/results.json: cannot be read ({error})"]
    for weights, summary in sets.items():
        entry: dict[str, Any] = {"weights": weights, "summary": summary}
        for name, read in _SEGMENTATION if "mIoU" in summary else _CLASSIFICATION:
            file = folder / f"{name}_{weights}.csv"
            try:
                with file.open(newline="", encoding="utf-8") as lines:
                    entry |= read(list(csv.DictReader(lines)))
            except Exception as error:  # a damaged file can hold anything
                problems.append(f"{folder.name}/{file.name}: cannot be read ({error})")
        if summary.get("loss") is None:  # several right classes per image, of which the file has the first
            entry.pop("calibration", None)
        confused = folder / f"confusions_{weights}.png"
        entry["pictures"] = {"confused pairs": confused} if confused.is_file() else {}
        entry["pictures"] |= _overlays(folder / f"masks_{weights}")
        found.append(entry)
    return found, problems


def _overlays(masks: Path) -> dict[str, Path]:
    """Return some of the images with their masks, evenly spread, by their keys."""
    drawn = sorted(masks.rglob("*_overlay.jpg"))
    shown = [drawn[index] for index in sample_of(len(drawn), _MOST_OVERLAYS)] if drawn else []
    return {path.relative_to(masks).as_posix().removesuffix("_overlay.jpg"): path for path in shown}


def _calibration(rows: list[dict[str, str]]) -> dict[str, Any]:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row in rows:
        confidence = float(row["probability"])
        if not 0 <= confidence <= 1:
            raise ValueError(f"{confidence} is not a probability")
        bins[min(int(confidence * BINS), BINS - 1)].append((confidence, row["label"] == row["called"]))
    points = [
        [sum(share for share, _ in some) / len(some), sum(right for _, right in some) / len(some), len(some)]
        for some in bins
        if some
    ]
    return {"calibration": [[round(confidence, 4), round(accuracy, 4), n] for confidence, accuracy, n in points]}


def _classes(rows: list[dict[str, str]]) -> dict[str, Any]:
    numbers = ("images", "top1", "top5", "confidence")
    return {"classes": [[row["name"], *(float(row[name]) for name in numbers)] for row in rows]}


def _ious(rows: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "ious": [
            [row["class"], *(float(row[key]) if row[key] else None for key in ("iou", "accuracy"))] for row in rows
        ]
    }


def _pairs(rows: list[dict[str, str]]) -> dict[str, Any]:
    most = sorted(rows, key=lambda row: -int(row["images"]))[:_MOST_PAIRS]
    return {"pairs": [[describe(row["class"]), describe(row["called"]), int(row["images"])] for row in most]}


_CLASSIFICATION = (("images", _calibration), ("classes", _classes), ("confusions", _pairs))
_SEGMENTATION = (("classes", _ious),)
