"""Sweeper for hyperparameter search with Optuna.

Hydra imports this file at every start, also in other programs, so it imports no heavy packages and has no side effects.
"""

import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.vitrail_launchers import say_how_to_continue
from vitrail_runtime.checking import NonNegativeInt, PositiveInt, checked
from vitrail_runtime.compat import resumed_trial
from vitrail_runtime.main_metrics import default_metric
from vitrail_runtime.sweep_report import epochs_of

_WATCH_SECONDS = 1.0


@checked
class OptunaSweeper(Sweeper):
    """Sweeper that searches for the values with the best metric, using Optuna's tree-structured Parzen estimator.

    Only this process samples: a job gets fixed values and returns its results. The number of parallel trials is the
    launcher's number of parallel jobs. The study is saved in a file. If the sweep is started again in its directory
    (`hydra.sweep.dir=...`), the search continues, and unfinished trials resume from their checkpoints.

    Args:
        metric: key of a job's results, and column of its metrics.csv; None for `val/top1`, or `val/mIoU` for
            segmentation.
        direction: `maximize` or `minimize`.
        trials: total number of trials.
        space: for each config key either `choices`, or `low` and `high`, optionally with `log` and `step`; if both
            bounds are integers, the values are integers.
        seed: seed of the sampler.
        prune: how to end bad trials early: `median` ends a trial whose metric is worse than the median of the others
            after as many epochs, `halving` uses successive halving (arXiv:1810.05934); None ends none.
        prune_after: number of epochs before a trial can be ended.
        storage: Optuna storage URL of the study; None uses `study.db` in the sweep's directory.
    """

    def __init__(
        self,
        metric: str | None,
        direction: str,
        trials: PositiveInt,
        space: DictConfig,
        seed: NonNegativeInt = 0,
        prune: str | None = None,
        prune_after: NonNegativeInt = 1,
        storage: str | None = None,
    ) -> None:
        if prune not in (None, "median", "halving"):
            raise HydraException(f"hydra.sweeper.prune={prune}: choose median, halving or null.")
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
            HydraException: an argument has several values, or the results lack the metric.
        """
        try:
            import optuna
        except ImportError as error:
            raise HydraException("sweep: the search needs Optuna; run pip install 'vitrail[sweep]'.") from error

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        if swept := [item.input_line for item in parser.parse_overrides(arguments) if item.is_sweep_override()]:
            raise HydraException(
                f"{swept[0]}: a search accepts one value per key; add the key to the sweep's space instead."
            )
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
        if known:  # the sampler must not draw the same values again
            study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        lock = threading.Lock()
        numbers = self._numbers(study)

        def work() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                    trial = None if number is None else self._trial(study, number)
                if trial is None:
                    return
                self._run(study, trial, arguments)

        parallel = getattr(self.launcher, "parallel", 1)
        pool = ThreadPoolExecutor(parallel)
        futures = [pool.submit(work) for _ in range(parallel)]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            self.launcher.stopping.set()
            with lock:
                numbers.close()  # start no more trials
            if isinstance(error, KeyboardInterrupt):
                say_how_to_continue(directory.absolute())
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
        """Yield the numbers of the trials to run: unfinished ones of an earlier start, then new ones."""
        before = study.trials
        yield from (trial.number for trial in before if trial.state.name == "RUNNING")
        yield from range(len(before), self.trials)

    def _trial(self, study: Any, number: int) -> Any:
        return resumed_trial(study, number) or study.ask()

    def _run(self, study: Any, trial: Any, arguments: list[str]) -> None:
        """Run one trial, report its epochs to Optuna, and prune it."""
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
            return  # the trial stays unfinished in the study, and the next start resumes it
        results = outcome.return_value
        if results is not None:
            metric = self.metric or default_metric(results)
            if metric not in results:
                raise HydraException(
                    f"hydra.sweeper.metric={metric}: not in a job's results; choose from {', '.join(results)}."
                )
            study.tell(trial, results[metric])
        elif pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _report(self, trial: Any, directory: Path, reported: int) -> int:
        """Report the finished epochs of a job to Optuna, and return how many have been reported."""
        file = directory / "metrics.csv"
        if not file.is_file():
            return reported
        values = epochs_of(file, self.metric)
        for epoch, value in enumerate(values[reported:], start=reported + 1):
            trial.report(value, epoch)
        return len(values)

    def _sample(self, trial: Any) -> list[str]:
        return [f"{key}={self._suggest(trial, key, axis)}" for key, axis in self.space.items()]

    @staticmethod
    def _suggest(trial: Any, key: str, axis: Any) -> Any:
        if "choices" in axis:
            return trial.suggest_categorical(key, axis["choices"])
        is_integer = isinstance(axis["low"], int) and isinstance(axis["high"], int)
        options = {name: axis[name] for name in ("log", "step") if name in axis}
        return (trial.suggest_int if is_integer else trial.suggest_float)(key, axis["low"], axis["high"], **options)
