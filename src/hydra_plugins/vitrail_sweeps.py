"""How a sweep chooses its jobs, and what it shows at the end.

Hydra imports this file at every start, so it imports nothing heavy.
"""

import csv
import io
import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.vitrail_launchers import say_how_to_go_on

_WATCH_SECONDS = 1.0
_SPREAD_FOR_LOG = 10  # largest over smallest value from which an axis is drawn in decades


class OptunaSweeper(Sweeper):
    """Search for the values that give the best metric, with Optuna's tree-structured Parzen estimator.

    Only this process samples; a job gets fixed values and gives its results back. As many trials as the launcher runs
    jobs at a time are under way, each independent of the others. The study is kept in a file; started again with the
    same one (`hydra.sweep.dir=...`), the search goes on, and trials that were under way go on from their checkpoints.

    Args:
        metric: key of a job's results, and column of its metrics.csv.
        direction: `maximize` or `minimize`.
        trials: jobs to run in all.
        space: for each config key either `choices`, or `low` and `high` with `log` and `step` at will; whole numbers
            give whole numbers.
        seed: of the sampler.
        prune: end trials that are worse after an epoch than `median` of the others were after as many, or than what
            `halving` (successive halving, arXiv:1810.05934) lets through; None ends none.
        prune_after: epochs before a trial may be ended.
        storage: Optuna's address of the study; None keeps it in `study.db` in the sweep's directory.
    """

    def __init__(
        self,
        metric: str,
        direction: str,
        trials: int,
        space: DictConfig,
        seed: int = 0,
        prune: str | None = None,
        prune_after: int = 1,
        storage: str | None = None,
    ) -> None:
        if prune not in (None, "median", "halving"):
            raise ValueError(f"hydra.sweeper.prune={prune}: choose median, halving or null.")
        self.metric, self.direction, self.trials, self.seed = metric, direction, trials, seed
        self.prune, self.prune_after, self.storage = prune, prune_after, storage
        self.space = {str(key): OmegaConf.to_container(OmegaConf.create(value)) for key, value in space.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build the launcher."""
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run all trials.

        Raises:
            ValueError: an argument sweeps by itself, or the results lack the metric.
        """
        try:
            import optuna
        except ImportError as error:
            raise ValueError("sweep: the search needs Optuna, pip install 'vitrail[sweep]'.") from error

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        if swept := [item.input_line for item in parser.parse_overrides(arguments) if item.is_sweep_override()]:
            raise ValueError(f"{swept[0]}: several values do not go with a search; put the key into the sweep's space.")
        directory = Path(self.config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, directory / "multirun.yaml")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = self.storage or f"sqlite:///{directory / 'study.db'}"
        known = optuna.study.get_all_study_names(storage)
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction=self.direction,
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=self._pruner(optuna),
        )
        if known:  # the sampler must not repeat what it drew before
            study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        asking = threading.Lock()
        numbers = self._numbers(study)

        def work() -> None:
            while True:
                with asking:
                    number = next(numbers, None)
                    trial = None if number is None else self._trial(study, number)
                if trial is None:
                    return
                self._run(study, trial, arguments)

        pool = ThreadPoolExecutor(getattr(self.launcher, "parallel", 1))
        futures = [pool.submit(work) for _ in range(pool._max_workers)]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            self.launcher.stopping.set()
            with asking:
                numbers.close()  # no more trials
            if isinstance(error, KeyboardInterrupt):
                say_how_to_go_on(directory.absolute())
            raise
        finally:
            pool.shutdown(wait=True)

    def _pruner(self, optuna: Any) -> Any:
        if self.prune == "median":
            return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=self.prune_after)
        if self.prune == "halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=self.prune_after, reduction_factor=2)
        return optuna.pruners.NopPruner()

    def _numbers(self, study: Any) -> Generator[int, None, None]:
        """Trials to run: those that an earlier start left under way, then new ones."""
        before = study.trials
        yield from (trial.number for trial in before if trial.state.name == "RUNNING")
        yield from range(len(before), self.trials)

    def _trial(self, study: Any, number: int) -> Any:
        import optuna

        begun = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
        return optuna.Trial(study, begun[number]._trial_id) if number in begun else study.ask()

    def _run(self, study: Any, trial: Any, arguments: list[str]) -> None:
        """Run one trial, and watch it."""
        import optuna

        overrides = [*arguments, *self._sample(trial)]
        directory = Path(self.config.hydra.sweep.dir) / str(trial.number)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(self.launcher.launch, [overrides], trial.number)
            pruned, reported = False, len(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
            while not job.done():
                time.sleep(_WATCH_SECONDS)
                if self.prune and not pruned:
                    reported = self._report(trial, directory, reported)
                    pruned = reported > 0 and trial.should_prune()
                    if pruned:
                        (directory / "stop").touch()
        (outcome,) = job.result()
        if self.launcher.stopping.is_set() and outcome.return_value is None:
            return  # the study knows it as under way, and goes on with it
        results = outcome.return_value
        if results is not None and self.metric not in results:
            raise ValueError(f"hydra.sweeper.metric={self.metric}: a job's results hold {', '.join(results)}.")
        if results is not None:
            study.tell(trial, results[self.metric])
        elif pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _report(self, trial: Any, directory: Path, reported: int) -> int:
        """Tell Optuna of the epochs that a job has finished; how many it knows of."""
        file = directory / "metrics.csv"
        if not file.is_file():
            return reported
        values = _epochs(file, self.metric)
        for epoch, value in enumerate(values[reported:], start=reported + 1):
            trial.report(value, epoch)
        return len(values)

    def _sample(self, trial: Any) -> list[str]:
        return [f"{key}={self._suggest(trial, key, axis)}" for key, axis in self.space.items()]

    @staticmethod
    def _suggest(trial: Any, key: str, axis: Any) -> Any:
        if "choices" in axis:
            return trial.suggest_categorical(key, axis["choices"])
        whole = isinstance(axis["low"], int) and isinstance(axis["high"], int)
        options = {name: axis[name] for name in ("log", "step") if name in axis}
        return (trial.suggest_int if whole else trial.suggest_float)(key, axis["low"], axis["high"], **options)


class SweepTable(Callback):
    """At the end of a sweep: its jobs as a table and a picture, best first; a failing exit status if one failed.

    Args:
        metric: key of the jobs' results that orders the table.
    """

    def __init__(self, metric: str = "val/top1") -> None:
        self.metric = metric

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, draw `sweep.png`, and exit with 1 where a job failed."""
        from rich.console import Console
        from rich.table import Table

        directory = Path(config.hydra.sweep.dir)
        record = directory / "jobs.json"
        if not record.is_file():
            return
        jobs = json.loads(record.read_text())
        metric, largest = self.metric, True
        if "metric" in config.hydra.sweeper:  # a search says itself what is best
            metric, largest = config.hydra.sweeper.metric, config.hydra.sweeper.direction == "maximize"
        for job in jobs:
            if job["status"] == "pruned":
                job["results"] = _best_so_far(Path(job["directory"]), metric, largest)
        sign, worst = (-1 if largest else 1), float("-inf" if largest else "inf")
        differing = varied(jobs)
        table = Table(title=f"{len(jobs)} jobs in {directory}")
        columns = list(dict.fromkeys((metric, "val/top1", "val/top1_ema")))
        for name in ("job", *differing, *columns, "seconds", "status"):
            table.add_column(name, overflow="fold")
        for job in sorted(jobs, key=lambda job: sign * (job["results"] or {}).get(metric, worst)):
            values = dict(item.split("=", 1) for item in job["overrides"])
            scores = [_number((job["results"] or {}).get(key)) for key in columns]
            chosen = [_short(values.get(key, "")) for key in differing]
            table.add_row(str(job["number"]), *chosen, *scores, f"{job['seconds']:.0f}", _status(job["status"]))
        Console().print(table)
        if differing:
            self._draw(jobs, metric, largest, directory)
        failed = [job for job in jobs if job["status"] not in (0, "pruned")]
        if failed:
            names = ", ".join(f"job {job['number']} ({' '.join(job['overrides'])})" for job in failed)
            print(f"error: {len(failed)} of {len(jobs)} jobs failed: {names}", file=sys.stderr)
            sys.exit(1)

    @staticmethod
    def _draw(jobs: list[dict[str, Any]], metric: str, largest: bool, directory: Path) -> None:
        try:
            picture = sweep_picture(jobs, metric, largest)
        except ImportError:  # matplotlib
            return
        if picture is not None:
            picture.save(directory / "sweep.png")
            print(f"picture {directory / 'sweep.png'}")


def _epochs(file: Path, metric: str) -> list[float]:
    with file.open(newline="", encoding="utf-8") as rows:
        return [float(row[metric]) for row in csv.DictReader(rows) if row.get(metric)]


def _best_so_far(directory: Path, metric: str, largest: bool) -> dict[str, float] | None:
    file = directory / "metrics.csv"
    values = _epochs(file, metric) if file.is_file() else []
    return {metric: max(values) if largest else min(values)} if values else None


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
    numeric = {name: all(_is_number(value) for value in kinds[name]) for name in names}
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def varied(jobs: list[dict[str, Any]]) -> list[str]:
    """Keys that not all jobs have the same value of."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for item in job["overrides"]:
            key, _, value = item.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def _status(status: int | str) -> str:
    if status == 0:
        return "done"
    return "ended early" if status == "pruned" else f"[red]failed ({status})"


def _short(value: str) -> str:
    """A sampled number in a few digits."""
    return f"{float(value):.4g}" if "." in value and _is_number(value) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
