"""The hyperparameters of a sweep: which vary, and how much each matters.

Optuna is imported where it is used, because Hydra imports the sweep's report at every start.
"""

from typing import Any

JOBS_FOR_IMPORTANCE = 5
"""Smallest number of finished jobs for which an importance is computed."""


def sweep_study(
    jobs: list[dict[str, Any]], metric: str, largest: bool = True
) -> tuple[Any, list[str], list[dict[str, Any]]]:
    """Return the jobs of a sweep as an Optuna study, the keys that vary, and the jobs that have results.

    Args:
        jobs: contents of `jobs.json`: `overrides`, `status` and `results` of each job; for a pruned job, its best
            results so far.
        metric: key of the results.
        largest: whether a larger metric is better.

    Returns:
        None instead of the study with fewer than two results, or if no key varies.

    Raises:
        ImportError: Optuna is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    finished = [job for job in jobs if metric in (job["results"] or {})]
    values = [dict(item.split("=", 1) for item in job["overrides"]) for job in finished]
    names = [name for name in varied(finished) if all(name in row for row in values)]
    if len(finished) < 2 or not names:
        return None, names, finished
    spaces = {name: _space([row[name] for row in values]) for name in names}
    study = optuna.create_study(direction="maximize" if largest else "minimize")
    for row, job in zip(values, finished, strict=True):
        params = {name: float(row[name]) if _is_numeric(space) else row[name] for name, space in spaces.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=spaces, value=float(job["results"][metric])))
    return study, names, finished


def importances(study: Any, finished: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of each key in the variance of the results, by fANOVA (Hutter et al., ICML 2014).

    Empty with fewer than five finished jobs, or if only one key varies.
    """
    import optuna

    complete = sum(job.get("status") != "pruned" for job in finished)
    if complete < JOBS_FOR_IMPORTANCE or len(study.trials[0].params) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _space(values: list[str]) -> Any:
    """Return Optuna's distribution of one key: a range of numbers, on a log scale if it is wide, or choices."""
    import optuna

    if not all(map(is_number, values)):
        return optuna.distributions.CategoricalDistribution(sorted(set(values)))
    low, high = min(map(float, values)), max(map(float, values))
    return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low >= 10)


def _is_numeric(space: Any) -> bool:
    return hasattr(space, "low")


def varied(jobs: list[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between jobs."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for item in job["overrides"]:
            key, _, value = item.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
