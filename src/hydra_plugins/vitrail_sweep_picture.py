"""A picture of what a sweep found.

Hydra imports this file at every start, so matplotlib and Optuna are imported where they are used.
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

_SPREAD_FOR_LOG = 10  # largest over smallest value from which an axis is drawn in decades


def sweep_picture(jobs: list[dict[str, Any]], metric: str, largest: bool = True) -> Any:
    """A picture of what a sweep found: each job a line through its values, and how much each value mattered.

    The importance is fANOVA's (Hutter et al., ICML 2014), from five jobs on.

    Args:
        jobs: what `jobs.json` holds: `overrides` of each job, its `status` and its `results`; of one that was ended
            early, the best so far.
        metric: key of the results.
        largest: whether the largest is the best.

    Returns:
        PIL's image; None where fewer than two jobs have that result, or where they do not differ.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    finished = [job for job in jobs if metric in (job["results"] or {})]
    finished.sort(key=lambda job: job["results"][metric], reverse=not largest)  # the best is drawn last, on top
    whole = [job.get("status") != "pruned" for job in finished]
    values = [dict(item.split("=", 1) for item in job["overrides"]) for job in finished]
    names = [name for name in varied(finished) if all(name in row for row in values)]
    if not names:
        return None
    scores = [job["results"][metric] for job in finished]
    importances = {}
    if sum(whole) >= 5 and len(names) > 1:
        rows = [row for row, full in zip(values, whole, strict=True) if full]
        importances = _importances(
            rows, names, [score for score, full in zip(scores, whole, strict=True) if full], largest
        )
    widths = (1 + len(names), 1.6) if importances else (1,)
    figure, panels = pyplot.subplots(
        *(1, len(widths)), figsize=(2 + 2 * len(names) + 2 * len(widths), 4.8), width_ratios=widths, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    lines = panels[0][0]
    axes = [_positions([row[name] for row in values]) for name in names]
    axes.append(_positions([str(score) for score in scores]))
    colours = matplotlib.colormaps["viridis_r"](_fractions(scores if largest else [-score for score in scores]))
    for number, colour in enumerate(colours):
        best = number == len(colours) - 1
        heights = [positions[number] for positions, _ in axes]
        style = (
            {"linewidth": 3} if best else {"linewidth": 1.2, "alpha": 0.7, "linestyle": "-" if whole[number] else ":"}
        )
        lines.plot(range(len(axes)), heights, color=colour, **style)
    for number, (_, ticks) in enumerate(axes):
        lines.axvline(number, color="0.6", linewidth=0.8)
        for height, text in ticks.items():
            lines.annotate(text, (number, height), (5, 0), textcoords="offset points", va="center", fontsize=9)
    lines.set_xticks(range(len(axes)), [*names, metric])
    lines.set_xlim(-0.1, len(axes) - 0.6)
    lines.set_yticks([])
    lines.spines[:].set_visible(False)
    early = "" if all(whole) else f", {whole.count(False)} ended early (dotted)"
    lines.set_title(f"{len(finished)} jobs{early}; the best {scores[-1]:.4g} (thick)", loc="left")
    if importances:
        bars, ranked = panels[0][1], sorted(importances, key=lambda name: importances[name])
        bars.barh(ranked, [importances[name] for name in ranked], color="0.45")
        bars.set_title("share in the differences", loc="left")
        bars.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    return Image.open(content).convert("RGB")


def _positions(values: list[str]) -> tuple[list[float], dict[float, str]]:
    """Height of each value on its axis, in [0, 1], and what to write where; numbers far apart in decades."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        kinds = sorted(set(values))
        heights = _fractions(list(range(len(kinds))))
        return [heights[kinds.index(value)] for value in values], dict(zip(heights, kinds, strict=True))
    low, high = min(numbers), max(numbers)
    logarithmic = low > 0 and high / low >= _SPREAD_FOR_LOG
    scaled = [math.log(number) for number in numbers] if logarithmic else numbers
    if len(set(numbers)) <= 5:
        texts = {number: f"{number:g}" for number in numbers}
    else:
        middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
        texts = {number: f"{number:.3g}" for number in (low, middle, high)}
    ends = min(scaled), max(scaled)
    place = {
        number: ((math.log(number) if logarithmic else number) - ends[0]) / (ends[1] - ends[0] or 1) for number in texts
    }
    return _fractions(scaled), {place[number]: text for number, text in texts.items()}


def _fractions(numbers: Sequence[float]) -> list[float]:
    low, high = min(numbers), max(numbers)
    return [(number - low) / (high - low or 1) for number in numbers]


def _importances(
    values: list[dict[str, str]], names: list[str], scores: list[float], largest: bool
) -> dict[str, float]:
    try:
        import optuna
    except ImportError:  # a grid needs none
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {name: sorted({row[name] for row in values}) for name in names}
    numeric = {name: all(is_number(value) for value in kinds[name]) for name in names}
    spaces = {
        name: optuna.distributions.FloatDistribution(*(extreme(map(float, kinds[name])) for extreme in (min, max)))
        if numeric[name]
        else optuna.distributions.CategoricalDistribution(kinds[name])
        for name in names
    }
    study = optuna.create_study(direction="maximize" if largest else "minimize")
    for row, score in zip(values, scores, strict=True):
        params = {name: float(row[name]) if numeric[name] else row[name] for name in names}
        study.add_trial(optuna.create_trial(params=params, distributions=spaces, value=score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    return {name: float(share) for name, share in found.items()}


def varied(jobs: list[dict[str, Any]]) -> list[str]:
    """Keys that not all jobs have the same value of."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for item in job["overrides"]:
            key, _, value = item.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def is_number(text: str) -> bool:
    """Whether an override's value is one."""
    try:
        float(text)
    except ValueError:
        return False
    return True
