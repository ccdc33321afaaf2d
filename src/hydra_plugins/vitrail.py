"""vitrail's plugins for Hydra, which looks for plugins in this folder: resolvers, a launcher, a sweeper, a table.

Hydra imports this file at every start, so it imports nothing heavy.

In a sweep every job is a fresh process in Hydra's run mode with a run directory of its own. Hydra's own launcher would
run the jobs inside the parent, where Lightning passes the parent's `--multirun` on to the ranks it starts: each of
them would begin the whole sweep again (Lightning issue 11300, Hydra issue 2070).
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

PROJECT = Path(__file__).resolve().parents[2]

# What a launcher (Lightning's, torchrun's) tells a process about its rank; a job must not inherit it.
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)


# Resolvers


@cache
def _stamp() -> str:
    """Date, time and a part that two jobs started in the same second do not share; one for all processes of a job."""
    stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"
    return _agree(stamp) if "TORCHELASTIC_RUN_ID" in os.environ else stamp


def _agree(stamp: str) -> str:
    """Under torchrun every process composes its config itself: take the stamp of rank 0, through torchrun's store.

    (The ranks that Lightning starts are given the run directory on their command line.)
    """
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"vitrail/stamp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if os.environ["RANK"] == "0":
        store.set(key, stamp)
    return store.get(key).decode()


def _run_dir(logs: str, task: str, resume: str | None) -> str:
    if not resume:
        return str(Path(logs) / task / "runs" / _stamp())
    directory = Path(resume).expanduser().absolute()
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"resume={resume}: no run directory (it would hold a config.yaml).")
    return str(directory)


def _needed(key: str, what: str) -> str:
    """For values that an experiment cannot do without; OmegaConf's ??? gives way to the group's null."""
    raise ValueError(f"{key}: not set; this experiment needs {what}, {key}=...")


def _auto_precision() -> str:
    import torch

    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


OmegaConf.register_new_resolver("project", lambda: str(PROJECT), replace=True)
OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
OmegaConf.register_new_resolver(
    "sweep_dir", lambda logs, task: str(Path(logs) / task / "multiruns" / _stamp()), replace=True
)
OmegaConf.register_new_resolver("needed", _needed, replace=True)
OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)


# Sweeps


class JobLauncher(Launcher):
    """Run each job as a fresh process on this machine.

    A job that fails is noted and the others go on. Each job's result is what it leaves in `results.json`.

    Args:
        parallel: jobs at a time; with more than one, each writes to `console.log` in its own directory.
    """

    def __init__(self, parallel: int = 1) -> None:
        self.parallel = parallel

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs."""
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; a JobReturn's value is the job's results, or None where it failed."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.sweep_dir = Path(self.config.hydra.sweep.dir)
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        with ThreadPoolExecutor(self.parallel) as pool:
            jobs = list(pool.map(self._run, numbers, job_overrides))
        record = self.sweep_dir / "jobs.json"
        earlier = json.loads(record.read_text()) if record.is_file() else []
        record.write_text(json.dumps(earlier + jobs, indent=1))
        return [self._job_return(job) for job in jobs]

    def _run(self, number: int, overrides: Sequence[str]) -> dict[str, Any]:
        directory = self.sweep_dir / str(number)
        directory.mkdir(exist_ok=True)
        if self.parallel == 1:
            print(f"\njob {number}: {' '.join(overrides)}", flush=True)
        started = time.monotonic()
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        # None lets a job write to this process's terminal.
        with (directory / "console.log").open("w") if self.parallel > 1 else nullcontext() as output:
            status = subprocess.run(
                self._command(directory, overrides), env=environment, stdout=output, stderr=output, check=False
            ).returncode
        results = directory / "results.json"
        return {
            "number": number,
            "overrides": list(overrides),
            "directory": str(directory),
            "status": status,
            "seconds": round(time.monotonic() - started, 1),
            "results": json.loads(results.read_text()) if status == 0 and results.is_file() else None,
        }

    def _command(self, directory: Path, overrides: Sequence[str]) -> list[str]:
        """The parent's program in run mode: its flags about configs, the job's overrides, and its own directory."""
        args = get_args_parser().parse_args(sys.argv[1:])
        flags = [
            part
            for flag, value in (
                ("--config-path", args.config_path),
                ("--config-name", args.config_name),
                ("--config-dir", args.config_dir),
            )
            if value
            for part in (flag, value)
        ]
        ours = ("hydra.mode=", "hydra.sweep", "hydra.run.", "hydra.launcher", "hydra.sweeper")
        hydra_overrides = [item for item in self.config.hydra.overrides.hydra if not item.startswith(ours)]
        return [
            *(sys.executable, str(Path(sys.argv[0]).absolute()), *flags, *overrides, *hydra_overrides),
            f'hydra.run.dir="{directory}"',
        ]

    @staticmethod
    def _job_return(job: dict[str, Any]) -> JobReturn:
        # COMPLETED even where the job failed: Hydra would end the sweep otherwise. SweepTable sets the exit status.
        return JobReturn(overrides=job["overrides"], status=JobStatus.COMPLETED, _return_value=job["results"])


class OptunaSweeper(Sweeper):
    """Search for the values that give the best metric, with Optuna's tree-structured Parzen estimator.

    Only this process samples; a job gets fixed values and gives its results back. The study is kept in `study.db` in
    the sweep's directory.

    Args:
        metric: key of a job's results.
        direction: `maximize` or `minimize`.
        trials: jobs to run.
        space: for each config key either `choices`, or `low` and `high` with `log` and `step` at will; whole numbers
            give whole numbers.
        seed: of the sampler.
    """

    def __init__(self, metric: str, direction: str, trials: int, space: DictConfig, seed: int = 0) -> None:
        self.metric, self.direction, self.trials, self.seed = metric, direction, trials, seed
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
        study = optuna.create_study(
            storage=f"sqlite:///{directory / 'study.db'}",
            study_name="sweep",
            direction=self.direction,
            sampler=optuna.samplers.TPESampler(seed=self.seed),
        )
        at_once = getattr(self.launcher, "parallel", 1)
        for first in range(0, self.trials, at_once):
            trials = [study.ask() for _ in range(min(at_once, self.trials - first))]
            overrides = [[*arguments, *self._sample(trial)] for trial in trials]
            for trial, job in zip(trials, self.launcher.launch(overrides, first), strict=True):
                results = job.return_value
                if results is not None and self.metric not in results:
                    raise ValueError(f"sweep.metric={self.metric}: a job's results hold {', '.join(results)}.")
                if results is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, results[self.metric])

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
    """At the end of a sweep: a table of its jobs, best first, and a failing exit status if one of them failed.

    Args:
        metric: key of the jobs' results that orders the table.
    """

    def __init__(self, metric: str = "val/top1") -> None:
        self.metric = metric

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and exit with 1 where a job failed."""
        from rich.console import Console
        from rich.table import Table

        directory = Path(config.hydra.sweep.dir)
        record = directory / "jobs.json"
        if not record.is_file():
            return
        jobs = json.loads(record.read_text())
        differing = _differing(jobs)
        table = Table(title=f"{len(jobs)} jobs in {directory}")
        for name in ("job", *differing, "top-1 %", "EMA top-1 %", "seconds", "status"):
            table.add_column(name, overflow="fold")
        for job in sorted(jobs, key=lambda job: -((job["results"] or {}).get(self.metric, float("-inf")))):
            values = dict(item.split("=", 1) for item in job["overrides"])
            scores = [_percent((job["results"] or {}).get(key)) for key in ("val/top1", "val/top1_ema")]
            status = "done" if job["status"] == 0 else f"[red]failed ({job['status']})"
            chosen = [values.get(key, "") for key in differing]
            table.add_row(str(job["number"]), *chosen, *scores, f"{job['seconds']:.0f}", status)
        Console().print(table)
        failed = [job for job in jobs if job["status"] != 0]
        if failed:
            names = ", ".join(f"job {job['number']} ({' '.join(job['overrides'])})" for job in failed)
            print(f"error: {len(failed)} of {len(jobs)} jobs failed: {names}", file=sys.stderr)
            sys.exit(1)


def _differing(jobs: list[dict[str, Any]]) -> list[str]:
    """Keys that not all jobs have the same value of."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for item in job["overrides"]:
            key, _, value = item.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
