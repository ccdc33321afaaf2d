"""Where the jobs of a sweep run: on this machine, on SLURM, on Ray.

Hydra imports this file at every start, also of other programs, so it imports nothing heavy and changes nothing.

Every job is a fresh process in Hydra's run mode with a run directory of its own. Hydra's own launchers run jobs inside
their process, where Lightning passes the parent's `--multirun` on to the ranks it starts: each of them would begin the
whole sweep again (Lightning issue 11300, Hydra issue 2070). And they end the sweep where one job dies.

A sweep that is started again in its directory (`hydra.sweep.dir=...`) goes on: finished jobs are left as they are, and
those that had begun go on from their last checkpoint.
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

from vitrail_runtime.compat import hydra_flags
from vitrail_runtime.programs import command_line
from vitrail_runtime.secrets import redacted

# What a launcher (Lightning's, torchrun's) tells a process about its rank; a job must not inherit it.
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)

_ASK_SECONDS = 60  # between two questions to SLURM about jobs that left no result; submitit asks every ten minutes

STOPPED = 128 + signal.SIGTERM
"""Exit status of a training that was asked to stop, and saved."""


class Job(NamedTuple):
    """One training of a sweep; it can be pickled, and run anywhere that sees the same files."""

    number: int
    overrides: list[str]
    directory: str
    command: list[str]

    def run(self, output: Any = None, **variables: str) -> int:
        """Run it to its end, from its last checkpoint where it has one; the exit status."""
        (Path(self.directory) / "stop").unlink(missing_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        begun = (Path(self.directory) / "checkpoints" / "last.ckpt").is_file()
        resume = [f"resume='{self.directory}'"] if begun else []
        command = [*self.command, *resume]
        return subprocess.run(
            command, env={**environment, **variables}, stdout=output, stderr=output, check=False
        ).returncode

    def results(self) -> dict[str, Any] | None:
        """What it left; None where it did not finish."""
        file = Path(self.directory) / "results.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def is_finished(self) -> bool:
        """Whether an earlier start of the sweep ran it, as it is now, to its end."""
        told = Path(self.directory) / "overrides.txt"
        if self.results() is None or not told.is_file():
            return False
        before = [line for line in told.read_text(encoding="utf-8").splitlines() if not line.startswith("resume=")]
        return before == self.overrides


Outcome = tuple[int | str, float]
"""Exit status (or what became of it), and seconds."""


class JobLauncher(Launcher):
    """Run each job as a fresh process on this machine.

    A job that fails is noted and the others go on. Each job's result is what it leaves in `results.json`.

    Args:
        parallel: jobs at a time; with more than one, each writes to `console.log` in its own directory. None runs as
            many as there are GPUs for.
        gpus: GPUs of each job, which then sees no others; None lets every job see all.
    """

    def __init__(self, parallel: int | None = 1, gpus: int | None = None) -> None:
        visible = visible_gpus() if gpus else []
        if gpus and len(visible) < gpus:
            raise HydraException(f"hydra.launcher.gpus={gpus}: only {len(visible)} GPUs are visible here.")
        most = len(visible) // gpus if gpus else 1
        self.parallel = most if parallel is None else parallel
        if gpus and self.parallel > most:
            raise HydraException(
                f"hydra.launcher.parallel={parallel}: {len(visible)} GPUs are enough for {most} jobs of {gpus}."
            )
        self._sets: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for number in range(self.parallel):
            self._sets.put(",".join(visible[number * gpus : (number + 1) * gpus]) if gpus else None)
        self._writing = threading.Lock()
        self.stopping = threading.Event()
        """Set by a sweeper that is asked to stop while others of its threads wait for jobs."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs."""
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; a JobReturn's value is the job's results, or None where it failed."""
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
        # COMPLETED even where the job failed: Hydra would end the sweep otherwise. SweepTable sets the exit status.
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=job.results()) for job in jobs
        ]

    def _job(self, folder: Path, number: int, overrides: list[str]) -> Job:
        """The parent's program in run mode: its flags about configs, the job's overrides, and its own directory."""
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
        ours = ("hydra.mode=", "hydra.sweep", "hydra.run.", "hydra.launcher", "hydra.sweeper")
        hydra_overrides = [item for item in self.config.hydra.overrides.hydra if not item.startswith(ours)]
        told = redacted(list(overrides))  # what is left out, the job finds in its environment
        command = [*command_line(), *flags, *told, *redacted(hydra_overrides), f'hydra.run.dir="{directory}"']
        return Job(number, told, str(directory), command)

    def _record(self, folder: Path, job: Job, outcome: Outcome) -> None:
        """Put a job's end into `jobs.json`, in place of what an earlier start noted of it."""
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
        """Run the jobs, so many at a time, and `keep` what became of each."""
        pool = ThreadPoolExecutor(self.parallel)
        futures = [pool.submit(self._run, job, keep) for job in jobs]
        try:
            for future in futures:
                future.result()
        finally:  # after Ctrl-C, which the running jobs have heard as well
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job, keep: Callable[[Job, Outcome], None]) -> None:
        if self.parallel == 1:
            print(f"\njob {job.number}: {' '.join(job.overrides)}", flush=True)
        gpus = self._sets.get()
        started = time.monotonic()
        # None lets a job write to this process's terminal.
        with (Path(job.directory) / "console.log").open("a") if self.parallel > 1 else nullcontext() as output:
            status = job.run(output, **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}))
        self._sets.put(gpus)
        keep(job, (status, time.monotonic() - started))


def _redact(file: Path) -> None:
    """Take secrets out of what Hydra wrote."""
    if file.is_file() and (text := file.read_text(encoding="utf-8")) != redacted(text):
        file.write_text(redacted(text), encoding="utf-8")


def say_how_to_continue(folder: Path) -> None:
    """After Ctrl-C."""
    print(f"\nstopped; the same command with hydra.sweep.dir={folder} goes on", file=sys.stderr, flush=True)


def visible_gpus() -> list[str]:
    """Numbers or names of the GPUs that this process may use, without waking them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


class SlurmLauncher(JobLauncher):
    """Submit each job to SLURM, through submitit: one job is one training, with a task for each of its processes.

    Several jobs become an array. A job that reaches its time limit is told so `signal_delay_s` before, by SIGUSR1; it
    saves, and is queued again to go on in its run directory. A job that SLURM preempts saves on SIGTERM, and SLURM
    queues it again. (Hydra's own launcher for submitit would start it at the beginning.)

    Args:
        parallel: jobs of an array that run at a time.
        nodes: machines of a job.
        tasks_per_node: processes of a job on each of them.
        signal_delay_s: seconds between the signal and the time limit.
        options: further options of sbatch, by submitit's names (`timeout_min`, `gpus_per_node`, `mem_gb`,
            `slurm_partition`, ...); those that are null are left out.
    """

    def __init__(
        self, parallel: int = 16, nodes: int = 1, tasks_per_node: int = 1, signal_delay_s: int = 120, **options: Any
    ) -> None:
        super().__init__(parallel)
        self.nodes, self.tasks_per_node = nodes, tasks_per_node
        self.options = {name: value for name, value in options.items() if value is not None}
        self.options["slurm_signal_delay_s"] = signal_delay_s

    def run(self, jobs: list[Job], keep: Callable[[Job, Outcome], None]) -> None:
        """Submit the jobs and wait for all."""
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read at import, here and in the job; trainings listen to it
        try:
            import submitit
        except ImportError as error:
            raise HydraException("launcher=slurm: needs submitit, pip install 'vitrail[slurm]'.") from error
        if not jobs:
            return
        submitit.SlurmJob.watcher = type(submitit.SlurmJob.watcher)(delay_s=_ASK_SECONDS)
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
        open_ = dict(zip(submitted, jobs, strict=True))
        try:
            while open_ and not self.stopping.is_set():
                for future in [future for future in open_ if future.done()]:
                    keep(open_.pop(future), (_outcome(future), time.monotonic() - started))
                time.sleep(1)
        finally:  # after Ctrl-C
            for future in open_:
                future.cancel()


def _outcome(future: Any) -> int | str:
    try:
        return max(future.results())
    except Exception as error:  # submitit's own, where the job's end left no result: killed, out of memory, a lost node
        return f"{type(error).__name__}, SLURM says {future.state}"


def _slurm_task(job: Job) -> int:
    """What each task of a SLURM job runs: the training, which takes part as Lightning's SLURM environment says."""
    heard: set[int] = set()
    for signum in (signal.SIGUSR1, signal.SIGTERM):  # every process of the job gets them; they are the training's
        signal.signal(signum, lambda number, _: heard.add(number))  # ignored, they would be in the training, too
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    with (Path(job.directory) / "console.log").open("a") if first else nullcontext() as output:
        status = job.run(output)
    out_of_time = status in (128 + signal.SIGUSR1, -signal.SIGUSR1)  # the latter: before it had anything to save
    if out_of_time and first:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    if out_of_time or (signal.SIGTERM in heard and status != 0):
        time.sleep(3600)  # until SLURM ends this task: if it ended by itself, the job would be over, not preempted
    return status


class RayLauncher(JobLauncher):
    """Run each job as a process on a Ray cluster, or on a Ray of this machine alone.

    Args:
        address: of the cluster; None starts Ray here.
        parallel: jobs at a time.
        cpus: of each job.
        gpus: of each job.
    """

    def __init__(self, address: str | None = None, parallel: int = 16, cpus: float = 1, gpus: float = 0) -> None:
        super().__init__(parallel)
        self.address, self.resources = address, {"num_cpus": cpus, "num_gpus": gpus}
        self._starting = threading.Lock()

    def run(self, jobs: list[Job], keep: Callable[[Job, Outcome], None]) -> None:
        """Hand the jobs to Ray and wait for all."""
        try:
            import ray
        except ImportError as error:
            raise HydraException("launcher=ray: needs Ray, pip install 'vitrail[ray]'.") from error
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
                    except Exception as error:  # Ray's own: the worker died, the cluster lost a node
                        outcome = f"{type(error).__name__}"
                    keep(job, (outcome, time.monotonic() - started))
        finally:  # after Ctrl-C
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=30)


def _ray_task(job: Job) -> int:
    with (Path(job.directory) / "console.log").open("a") as output:
        return job.run(output)
