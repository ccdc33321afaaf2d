"""Launchers that run the jobs of a sweep: on this machine, on SLURM or on Ray.

Hydra imports this file at every start, also in other programs, so it imports no heavy packages and has no side effects.

Every job is a new process in Hydra's run mode with its own run directory. Hydra's own launchers run jobs inside their
process, where Lightning passes the parent's `--multirun` on to the ranks that it starts: each rank would start the
whole sweep again (Lightning issue 11300, Hydra issue 2070). They also end the sweep if one job fails.

A sweep that is started again in its directory (`hydra.sweep.dir=...`) continues: finished jobs are kept, and
unfinished ones resume from their last checkpoint.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from vitrail_runtime.checking import NonNegative, NonNegativeInt, PositiveInt, checked
from vitrail_runtime.compat import hydra_flags
from vitrail_runtime.invocation import command_line
from vitrail_runtime.secrets import redacted

# Variables in which a launcher (Lightning's, torchrun's) passes its rank to a process; a job must not inherit them.
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)

_POLL_SECONDS = 60  # interval of polling SLURM about jobs that left no result; submitit's default is ten minutes

STOPPED = 128 + signal.SIGTERM
"""Exit status of a training that was stopped and has saved its checkpoint."""


class Job(NamedTuple):
    """One training of a sweep; it can be pickled and run on any machine with the same file system."""

    number: int
    overrides: list[str]
    directory: str
    command: list[str]

    def run(self, output: Any = None, **variables: str) -> int:
        """Run the job to its end, from its last checkpoint if there is one, and return the exit status."""
        (Path(self.directory) / "stop").unlink(missing_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        has_checkpoint = (Path(self.directory) / "checkpoints" / "last.ckpt").is_file()
        resume = [f"resume='{self.directory}'"] if has_checkpoint else []
        command = [*self.command, *resume]
        return subprocess.run(
            command, env={**environment, **variables}, stdout=output, stderr=output, check=False
        ).returncode

    def results(self) -> dict[str, Any] | None:
        """Return the contents of the job's `results.json`; None if the job did not finish."""
        file = Path(self.directory) / "results.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def is_finished(self) -> bool:
        """Return whether an earlier start of the sweep finished this job with the same overrides."""
        saved = Path(self.directory) / "overrides.txt"
        if self.results() is None or not saved.is_file():
            return False
        first = saved.read_text(encoding="utf-8").partition("# resumed")[0]
        return [line for line in first.splitlines() if not line.startswith("resume=")] == self.overrides


Outcome = tuple[int | str, float]
"""Exit status (or a description of the failure), and seconds."""


@checked
class JobLauncher(Launcher):
    """Launcher that runs each job as a new process on this machine.

    A failed job is recorded, and the others continue. The result of a job is the content of its `results.json`.

    Args:
        parallel: number of parallel jobs; if it is more than one, each job writes to `console.log` in its own
            directory. None runs as many as there are GPUs for.
        gpus: number of GPUs per job, which are the only ones visible to it; None makes all GPUs visible to every job.
    """

    def __init__(self, parallel: PositiveInt | None = 1, gpus: PositiveInt | None = None) -> None:
        visible = visible_gpus() if gpus else []
        if gpus and len(visible) < gpus:
            raise HydraException(f"hydra.launcher.gpus={gpus}: only {len(visible)} GPUs are visible here.")
        most = len(visible) // gpus if gpus else 1
        self.parallel = most if parallel is None else parallel
        if gpus and self.parallel > most:
            raise HydraException(
                f"hydra.launcher.parallel={parallel}: {len(visible)} GPUs are only enough for {most} jobs with {gpus}"
                " GPUs each."
            )
        self._sets: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for number in range(self.parallel):
            self._sets.put(",".join(visible[number * gpus : (number + 1) * gpus]) if gpus else None)
        self._writing = threading.Lock()
        self.stopping = threading.Event()
        """Set by a sweeper to stop while its other threads wait for jobs."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the config for `launch`."""
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, and return their results as JobReturn values; None for failed jobs."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(self.config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _redact(folder / "multirun.yaml")
        jobs = [
            self._job(folder, number, [item for item in overrides if not item.startswith(("launcher=", "sweep="))])
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        waiting = [job for job in jobs if not job.is_finished()]

        def keep(job: Job, outcome: Outcome) -> None:
            self._record(folder, job, outcome)

        try:
            self.run(waiting, keep)
        except KeyboardInterrupt:
            say_how_to_continue(folder)
            raise
        # COMPLETED even if the job failed: otherwise Hydra would end the sweep. SweepTable sets the exit status.
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=job.results()) for job in jobs
        ]

    def _job(self, folder: Path, number: int, overrides: list[str]) -> Job:
        """Build a job: the parent's command in run mode, with its config flags, the job's overrides and directory."""
        directory = folder / str(number)
        directory.mkdir(exist_ok=True)
        args = hydra_flags(sys.argv[1:])
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
        of_sweep = ("hydra.mode=", "hydra.sweep", "hydra.run.", "hydra.launcher", "hydra.sweeper")
        hydra_overrides = [item for item in self.config.hydra.overrides.hydra if not item.startswith(of_sweep)]
        job_overrides = redacted(list(overrides))  # the job reads redacted secrets from its environment
        command = [*command_line(), *flags, *job_overrides, *redacted(hydra_overrides), f'hydra.run.dir="{directory}"']
        return Job(number, job_overrides, str(directory), command)

    def _record(self, folder: Path, job: Job, outcome: Outcome) -> None:
        """Write the outcome of a job to `jobs.json`, replacing its outcome of an earlier start."""
        status, seconds = outcome
        stopped = (Path(job.directory) / "stop").is_file()
        entry = {
            "number": job.number,
            "overrides": job.overrides,
            "directory": job.directory,
            "status": "pruned" if stopped and status == STOPPED else status,
            "seconds": round(seconds, 1),
            "results": job.results() if status == 0 else None,
        }
        with self._writing:
            record = folder / "jobs.json"
            earlier = json.loads(record.read_text()) if record.is_file() else []
            jobs = {other["number"]: other for other in (*earlier, entry)}
            unfinished = record.with_name(".jobs.json")
            unfinished.write_text(json.dumps([jobs[number] for number in sorted(jobs)], indent=1))
            unfinished.replace(record)

    def run(self, jobs: list[Job], keep: Callable[[Job, Outcome], None]) -> None:
        """Run the jobs, `parallel` at a time, and call `keep` with the outcome of each."""
        pool = ThreadPoolExecutor(self.parallel)
        futures = [pool.submit(self._run, job, keep) for job in jobs]
        try:
            for future in futures:
                future.result()
        finally:  # on Ctrl-C, which the running jobs receive too
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job, keep: Callable[[Job, Outcome], None]) -> None:
        if self.parallel == 1:
            print(f"\njob {job.number}: {' '.join(job.overrides)}", flush=True)
        gpus = self._sets.get()
        started = time.monotonic()
        # With None as output, the job writes to this process's terminal.
        with (Path(job.directory) / "console.log").open("a") if self.parallel > 1 else nullcontext() as output:
            status = job.run(output, **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}))
        self._sets.put(gpus)
        keep(job, (status, time.monotonic() - started))


def _redact(file: Path) -> None:
    """Redact secrets in a file that Hydra has written."""
    if file.is_file() and (text := file.read_text(encoding="utf-8")) != redacted(text):
        file.write_text(redacted(text), encoding="utf-8")


def say_how_to_continue(folder: Path) -> None:
    """Print how to continue the sweep after Ctrl-C."""
    text = f"\nstopped; to continue, run the same command with hydra.sweep.dir={folder}"
    print(text, file=sys.stderr, flush=True)


def visible_gpus() -> list[str]:
    """Return the numbers or names of the visible GPUs, without initialising CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


@checked
class SlurmLauncher(JobLauncher):
    """Launcher that submits each job to SLURM with submitit: one job is one training, with one task per process.

    Several jobs become an array. `signal_delay_s` before its time limit, a job gets SIGUSR1: it saves a checkpoint, is
    requeued, and resumes in its run directory. A job that SLURM preempts saves on SIGTERM, and SLURM requeues it.
    (Hydra's own submitit launcher would start it from the beginning.)

    Args:
        parallel: number of jobs of an array that run at the same time.
        nodes: number of nodes per job.
        tasks_per_node: number of processes per node.
        signal_delay_s: seconds between the signal and the time limit.
        options: further sbatch options, with submitit's names (`timeout_min`, `gpus_per_node`, `mem_gb`,
            `slurm_partition`, ...); null values are omitted.
    """

    def __init__(
        self,
        parallel: PositiveInt = 16,
        nodes: PositiveInt = 1,
        tasks_per_node: PositiveInt = 1,
        signal_delay_s: NonNegativeInt = 120,
        **options: Any,
    ) -> None:
        super().__init__(parallel)
        self.nodes, self.tasks_per_node = nodes, tasks_per_node
        self.options = {name: value for name, value in options.items() if value is not None}
        self.options["slurm_signal_delay_s"] = signal_delay_s

    def run(self, jobs: list[Job], keep: Callable[[Job, Outcome], None]) -> None:
        """Submit the jobs and wait for all of them."""
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # submitit reads it at import, here and in the job
        try:
            import submitit
        except ImportError as error:
            raise HydraException("launcher=slurm: needs submitit; run pip install 'vitrail[slurm]'.") from error
        if not jobs:
            return
        submitit.SlurmJob.watcher = type(submitit.SlurmJob.watcher)(delay_s=_POLL_SECONDS)
        try:
            executor = submitit.AutoExecutor(Path(jobs[0].directory).parent / "slurm", cluster="slurm")
            executor.update_parameters(
                name="vitrail",
                nodes=self.nodes,
                tasks_per_node=self.tasks_per_node,
                **{"slurm_array_parallelism": self.parallel, **self.options},
            )
            started = time.monotonic()
            submitted = executor.map_array(_slurm_task, jobs)
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            raise HydraException(f"launcher=slurm: {str(error).splitlines()[0]}") from error
        names = ", ".join(str(job.job_id) for job in submitted)
        print(f"SLURM job{'s' * (len(jobs) > 1)} {names}; output in {submitted[0].paths.folder}", flush=True)
        pending = dict(zip(submitted, jobs, strict=True))
        try:
            while pending and not self.stopping.is_set():
                for future in [future for future in pending if future.done()]:
                    keep(pending.pop(future), (_outcome(future), time.monotonic() - started))
                time.sleep(1)
        finally:  # on Ctrl-C
            for future in pending:
                future.cancel()


def _outcome(future: Any) -> int | str:
    try:
        return max(future.results())
    except Exception as error:  # submitit's errors for jobs without a result: killed, out of memory, a lost node
        return f"{type(error).__name__}, SLURM state {future.state}"


def _slurm_task(job: Job) -> int:
    """Run the training in one task of a SLURM job; its rank comes from Lightning's SLURM environment."""
    received: set[int] = set()
    # Every process of the job gets these signals, and the training handles them. A handler does nothing here; SIG_IGN
    # would be inherited by the training.
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, lambda number, _: received.add(number))
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    with (Path(job.directory) / "console.log").open("a") if first else nullcontext() as output:
        status = job.run(output)
    out_of_time = status in (128 + signal.SIGUSR1, -signal.SIGUSR1)  # negative: killed before its handler was installed
    if out_of_time and first:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    if out_of_time or (signal.SIGTERM in received and status != 0):
        time.sleep(3600)  # wait for SLURM to end this task: if it exited, the job would count as finished
    return status


@checked
class RayLauncher(JobLauncher):
    """Launcher that runs each job as a process on a Ray cluster, or with Ray on this machine only.

    Args:
        address: address of the cluster; None starts Ray on this machine.
        parallel: number of parallel jobs.
        cpus: number of CPUs per job.
        gpus: number of GPUs per job.
    """

    def __init__(
        self, address: str | None = None, parallel: PositiveInt = 16, cpus: NonNegative = 1, gpus: NonNegative = 0
    ) -> None:
        super().__init__(parallel)
        self.address, self.resources = address, {"num_cpus": cpus, "num_gpus": gpus}
        self._starting = threading.Lock()

    def run(self, jobs: list[Job], keep: Callable[[Job, Outcome], None]) -> None:
        """Run the jobs on Ray and wait for all of them."""
        try:
            import ray
        except ImportError as error:
            raise HydraException("launcher=ray: needs Ray; run pip install 'vitrail[ray]'.") from error
        with self._starting:
            if not ray.is_initialized():
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        task = ray.remote(**self.resources, max_retries=0)(_ray_task)
        started = time.monotonic()
        waiting = list(jobs)
        running: dict[Any, Job] = {}
        try:
            while (waiting or running) and not self.stopping.is_set():
                while waiting and len(running) < self.parallel:
                    job = waiting.pop(0)
                    running[task.remote(job)] = job
                ready, _ = ray.wait(list(running), num_returns=1, timeout=1)
                for reference in ready:
                    job = running.pop(reference)
                    try:
                        outcome: int | str = ray.get(reference)
                    except Exception as error:  # Ray's errors: the worker died, the cluster lost a node
                        outcome = f"{type(error).__name__}"
                    keep(job, (outcome, time.monotonic() - started))
        finally:  # on Ctrl-C
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=30)


def _ray_task(job: Job) -> int:
    with (Path(job.directory) / "console.log").open("a") as output:
        return job.run(output)
