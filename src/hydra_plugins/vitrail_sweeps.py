"""The sweeper that searches with Optuna.

Hydra imports this file at every start, also of other programs, so it imports nothing heavy and changes nothing.
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
from vitrail_runtime.compat import resumed_trial
from vitrail_runtime.sweep_report import epochs_of

_WATCH_SECONDS = 1.0


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
            HydraException: an argument sweeps by itself, or the results lack the metric.
        """
        try:
            import optuna
        except ImportError as error:
            raise HydraException("sweep: the search needs Optuna, pip install 'vitrail[sweep]'.") from error

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        if swept := [item.input_line for item in parser.parse_overrides(arguments) if item.is_sweep_override()]:
            raise HydraException(
                f"{swept[0]}: several values do not go with a search; put the key into the sweep's space."
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

        parallel = getattr(self.launcher, "parallel", 1)
        pool = ThreadPoolExecutor(parallel)
        futures = [pool.submit(work) for _ in range(parallel)]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            self.launcher.stopping.set()
            with asking:
                numbers.close()  # no more trials
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
        """Trials to run: those that an earlier start left under way, then new ones."""
        before = study.trials
        yield from (trial.number for trial in before if trial.state.name == "RUNNING")
        yield from range(len(before), self.trials)

    def _trial(self, study: Any, number: int) -> Any:
        return resumed_trial(study, number) or study.ask()

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
            raise HydraException(f"hydra.sweeper.metric={self.metric}: a job's results hold {', '.join(results)}.")
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
        whole = isinstance(axis["low"], int) and isinstance(axis["high"], int)
        options = {name: axis[name] for name in ("log", "step") if name in axis}
        return (trial.suggest_int if whole else trial.suggest_float)(key, axis["low"], axis["high"], **options)
