"""Tests on a real SLURM: tasks, arrays, failing jobs, time limits and preemption (`make test-slurm`)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import slurm_cluster
from programs import PROJECT, environment, metrics

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="starts daemons, which takes root"),
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"not installed: {', '.join(slurm_cluster.missing())}"),
]

QUICK = ("data.batch_size=16", "data.num_workers=1", "callbacks.model_summary=null", "callbacks.progress=null")


@pytest.fixture
def begin():
    """Start a program in the background; it is killed at the end of the test."""
    processes = []

    def start(*args, logs, cluster):
        process = subprocess.Popen(
            args,
            env=environment(logs, **cluster),
            cwd=logs,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.slurm(tmp_path_factory.mktemp("cluster") / "slurm") as variables:
        yield variables


def command(*args):
    return [sys.executable, str(PROJECT / "src/train.py"), *args]


def call(*args, logs, cluster, timeout=300):
    """Run a program to its end, and return its output."""
    result = subprocess.run(
        args, env=environment(logs, **cluster), cwd=logs, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sweep_of(logs: Path) -> Path:
    (directory,) = (logs / "train" / "multiruns").glob("*")
    return directory


def until(condition, what, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.2)


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def last_step(directory: Path) -> int:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_srun__two_tasks_are_one_training(cluster, tmp_path):
    """As in a user's job script, every task composes its config, and all share one run directory."""
    options = ("trainer=ddp_cpu_2", "epochs=1", "trainer.limit_train_batches=4", *QUICK)
    call(
        "srun",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--job-name=mine",
        *command(*options),
        logs=tmp_path,
        cluster=cluster,
    )
    (directory,) = (tmp_path / "train" / "runs").glob("*")
    assert directory.name.startswith("slurm_")
    assert [row["step"] for row in metrics(directory)] == [3]


def test_launcher__array_of_two_trainings_with_two_tasks(cluster, tmp_path):
    options = ("trainer=ddp_cpu_2", "epochs=1", "trainer.limit_train_batches=4", *QUICK)
    printed = call(
        *command("-m", "launcher=slurm", "model=vit_nano,deit_nano", *options, "hydra.launcher.timeout_min=10"),
        logs=tmp_path,
        cluster=cluster,
    )
    directory = sweep_of(tmp_path)
    jobs = json.loads((directory / "jobs.json").read_text())
    assert [job["status"] for job in jobs] == [0, 0], text(directory / "0" / "console.log")
    for number, model in enumerate(("vit_nano", "deit_nano")):
        assert yaml.safe_load((directory / str(number) / "config.yaml").read_text())["model"]["name"] == model
        assert [row["step"] for row in metrics(directory / str(number))] == [3]
    assert "2 jobs in" in printed
    script = next((directory / "slurm").glob("*_submission.sh")).read_text()
    for line in ("--ntasks-per-node=2", "--nodes=1", "--array=0-1%2", "--signal=USR1@120", "--time=10"):
        assert f"#SBATCH {line}" in script


def test_search__on_slurm(cluster, tmp_path):
    """Optuna runs in this process, and two trials of a toy training at a time on SLURM; bad ones are pruned."""
    options = ("epochs=8", "hydra.sweeper.trials=6", "hydra.sweeper.prune=median", "hydra.sweeper.prune_after=1")
    call(
        *(sys.executable, str(PROJECT / "tests/toy_training.py"), "-m", "sweep=lr_wd", "launcher=slurm", "trainer=cpu"),
        *(*options, "hydra.launcher.parallel=2"),
        logs=tmp_path,
        cluster={**cluster, "TOY_SECONDS": "1.5"},
    )
    jobs = json.loads((sweep_of(tmp_path) / "jobs.json").read_text())
    assert [job["number"] for job in jobs] == list(range(6))
    assert {job["status"] for job in jobs} == {0, "pruned"}
    assert len(list((sweep_of(tmp_path) / "slurm").glob("*_submission.sh"))) == 6
    assert (sweep_of(tmp_path) / "sweep.png").is_file()


def test_launcher__failed_jobs_are_reported(cluster, begin, tmp_path):
    """The second job has an invalid config, the third is killed; the first one finishes."""
    options = ("trainer=cpu", "augment=deit", "data.batch_size=16,17,18", "epochs=40", *QUICK[1:])
    process = begin(*command("-m", "launcher=slurm", *options), logs=tmp_path, cluster=cluster)
    until(lambda: list(tmp_path.glob("train/multiruns/*/2/metrics.csv")), "the third job")
    directory = sweep_of(tmp_path)
    name = next((directory / "slurm").glob("*_submission.sh")).name.split("_")[0]
    call("scancel", "--signal=KILL", f"{name}_2", logs=tmp_path, cluster=cluster)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1, printed
    statuses = [job["status"] for job in json.loads((directory / "jobs.json").read_text())]
    assert statuses[:2] == [0, 1], printed
    assert statuses[2] not in (0, 1)
    assert "data.batch_size=17: must be even" in text(directory / "1" / "console.log")


def test_launcher__job_out_of_time_resumes_in_its_run_directory(cluster, begin, tmp_path):
    """The time limit is two minutes; all processes get SIGUSR1 at least 25 seconds before it."""
    arguments = ("-m", "launcher=slurm", "trainer=ddp_cpu_2", "epochs=400", *QUICK, "callbacks.preemption.minutes=null")
    limits = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=25")
    process = begin(*command(*arguments, *limits), logs=tmp_path, cluster=cluster)

    def console() -> str:
        return "".join(text(path) for path in tmp_path.glob("train/multiruns/*/0/console.log"))

    until(lambda: "saved; resume=" in console(), "the signal")
    directory = sweep_of(tmp_path) / "0"
    stopped = last_step(directory)
    assert stopped > 0
    until(lambda: last_step(directory) > stopped, "the job's second start")
    assert len(list(directory.parent.glob("[0-9]*"))) == 1
    rows = [row["epoch"] for row in metrics(directory)]
    assert rows == sorted(set(rows))
    call("scancel", "--user=root", logs=tmp_path, cluster=cluster)
    process.communicate(timeout=200)


def test_preemption__saves_and_resumes(cluster, begin, tmp_path):
    """A job in a partition of higher priority takes the node; SLURM requeues the training, which resumes afterwards."""
    arguments = ("-m", "launcher=slurm", "trainer=ddp_cpu_2", "epochs=400", *QUICK, "callbacks.preemption.minutes=null")
    process = begin(*command(*arguments), logs=tmp_path, cluster=cluster)
    until(lambda: list(tmp_path.glob("train/multiruns/*/0/checkpoints/last.ckpt")), "the training")
    directory = sweep_of(tmp_path) / "0"
    urgent = ("srun", "--partition=urgent", "--ntasks=4", "sleep", "1")
    call(*urgent, logs=tmp_path, cluster=cluster)
    assert "SIGTERM" in text(directory / "console.log")
    assert "saved; resume=" in text(directory / "console.log")
    stopped = last_step(directory)
    until(lambda: last_step(directory) > stopped, "the job's second start")
    call("scancel", "--user=root", logs=tmp_path, cluster=cluster)
    process.communicate(timeout=200)
