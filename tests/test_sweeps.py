"""Multiruns in real processes: of real runs, and of a fast program that only pretends to train."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from PIL import Image

import masked
from programs import PROJECT, QUICK, environment, metrics, run

TOY = str(PROJECT / "tests" / "toy_training.py")


def sweep_directory(logs: Path) -> Path:
    (directory,) = (logs / "train" / "multiruns").glob("*")
    return directory


def toy(*args, logs, **variables):
    return subprocess.run(
        [sys.executable, TOY, "-m", *args],
        env=environment(logs, **variables),
        cwd=logs,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def jobs_of(directory: Path):
    return json.loads((directory / "jobs.json").read_text())


def starts(directory: Path, number: int) -> list[list[str]]:
    """Return the visible GPUs and the resumed directory of every start of a job."""
    return [line.split() for line in (directory / str(number) / "starts.txt").read_text().splitlines()]


def study_of(directory: Path):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{directory / 'study.db'}")


@pytest.mark.slow
def test_grid__new_process_per_job_also_with_ddp(tmp_path):
    """Lightning's launcher must not pass the sweep on to its ranks: two jobs with two ranks stay two jobs."""
    result = run(
        *("train.py", "-m", "trainer=ddp_cpu_2", "data.batch_size=16", "model=vit_nano,deit_nano", *QUICK[1:]),
        logs=tmp_path,
        LOCAL_RANK="0",  # a parent process under a launcher would pass this on
    )
    assert result.returncode == 0, result.stdout + result.stderr
    directory = sweep_directory(tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == ["0", "1", "jobs.json", "multirun.yaml", "sweep.png"]
    assert not (tmp_path / "train" / "runs").exists()
    for number, model in enumerate(("vit_nano", "deit_nano")):
        job = directory / str(number)
        assert not (job / "multirun.yaml").exists()
        assert yaml.safe_load((job / "config.yaml").read_text())["model"]["name"] == model
        assert len(metrics(job)) == 1
        assert metrics(job)[0]["step"] == 1  # two batches per epoch, counted from 0
    assert "deit_nano" in result.stdout.split("2 jobs in")[1]


def test_grid__failed_and_killed_jobs_do_not_stop_the_others(tmp_path):
    result = toy("seed=12,13,14,15", "hydra.launcher.parallel=2", logs=tmp_path)
    assert result.returncode == 1
    assert "2 of 4 jobs failed: job 1 (seed=13), job 2 (seed=14)" in result.stderr
    directory = sweep_directory(tmp_path)
    assert [job["status"] for job in jobs_of(directory)] == [0, 1, -9, 0]
    assert "seed=13: brings bad luck" in (directory / "1" / "console.log").read_text()
    assert "failed (-9)" in result.stdout


def test_grid__misspelt_group_fails_before_any_job(tmp_path):
    result = run("train.py", "-m", "model=vit_nano,vit_nanno", *QUICK, logs=tmp_path)
    assert result.returncode == 1
    assert "vit_nanno" in result.stderr
    assert not list((tmp_path / "train" / "multiruns").glob("*/0"))


def test_grid__continues_in_its_directory(tmp_path):
    """Finished jobs are kept, unfinished ones resume from their checkpoint, and changed ones run again."""
    arguments = ("optimizer.lr=1e-3,2e-3", "epochs=2", f"hydra.sweep.dir={tmp_path}/sweep")
    assert toy(*arguments, logs=tmp_path).returncode == 0
    (tmp_path / "sweep" / "1" / "results.json").unlink()
    assert toy(*arguments, logs=tmp_path).returncode == 0
    assert starts(tmp_path / "sweep", 0) == [["None", "None"]]
    assert starts(tmp_path / "sweep", 1) == [["None", "None"], ["None", str(tmp_path / "sweep" / "1")]]
    assert [job["results"]["epochs"] for job in jobs_of(tmp_path / "sweep")] == [2, 2]
    assert toy("optimizer.lr=1e-3,3e-3", *arguments[1:], logs=tmp_path).returncode == 0
    assert len(starts(tmp_path / "sweep", 0)) == 1
    assert jobs_of(tmp_path / "sweep")[1]["overrides"] == ["optimizer.lr=0.003", "epochs=2"]


@pytest.mark.slow
def test_grid__gpus_are_distributed(tmp_path):
    """With four GPUs, two jobs with two GPUs each run in parallel, and never share a GPU."""
    options = ("hydra.launcher.gpus=2", "hydra.launcher.parallel=null", f"hydra.sweep.dir={tmp_path}/sweep")
    result = toy("seed=1,2,3,4", *options, logs=tmp_path, CUDA_VISIBLE_DEVICES="4,5,6,7", TOY_SECONDS="0.02")
    assert result.returncode == 0, result.stderr
    seen = [starts(tmp_path / "sweep", number)[0][0] for number in range(4)]
    assert set(seen) == {"4,5", "6,7"}
    result = toy("seed=1,2", *options, logs=tmp_path, CUDA_VISIBLE_DEVICES="0")
    assert "launcher.gpus=2: only 1 GPUs are visible here" in result.stderr


SEARCH = ("sweep=lr_wd", "epochs=6")


@pytest.mark.slow
def test_search__prunes_bad_trials(tmp_path):
    options = ("hydra.sweeper.trials=9", "hydra.sweeper.prune=median", "hydra.sweeper.prune_after=1")
    result = toy(*SEARCH, *options, "hydra.launcher.parallel=3", logs=tmp_path, TOY_SECONDS="0.7")
    assert result.returncode == 0, result.stdout + result.stderr
    directory = sweep_directory(tmp_path)
    trials = study_of(directory).trials
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(trials) == 9 == len(pruned) + len(done)
    assert pruned
    for trial, job in zip(trials, jobs_of(directory), strict=True):
        assert f"optimizer.lr={trial.params['optimizer.lr']}" in job["overrides"]
        assert job["status"] == ("pruned" if trial in pruned else 0)
        assert len(trial.intermediate_values) < 6 or trial in done
        if trial in done:
            assert trial.value == job["results"]["val/top1"]
    assert result.stdout.count("ended early") == len(pruned)
    worst_done = min(trial.value for trial in done[3:]) if len(done) > 3 else min(trial.value for trial in done)
    assert max(max(trial.intermediate_values.values()) for trial in pruned) < max(trial.value for trial in done)
    assert worst_done <= max(trial.value for trial in done)
    width, height = Image.open(directory / "sweep.png").size
    assert width > 500
    assert height > 500 or len(done) < 5


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_search__stopped_and_continued(signum, tmp_path):
    """A search stopped during its first trials resumes them, and ends with the requested number of trials."""
    arguments = (*SEARCH, "hydra.sweeper.trials=5", "hydra.launcher.parallel=2", f"hydra.sweep.dir={tmp_path}/sweep")
    process = subprocess.Popen(
        [sys.executable, TOY, "-m", *arguments], env=environment(tmp_path, TOY_SECONDS="5"), start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("sweep/*/metrics.csv"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signum)
    process.wait(60)
    assert [trial.state.name for trial in study_of(tmp_path / "sweep").trials] == ["RUNNING", "RUNNING"]
    before = [trial.params for trial in study_of(tmp_path / "sweep").trials]
    result = toy(*arguments, logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = study_of(tmp_path / "sweep").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert [trial.params for trial in trials[:2]] == before
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 5
    for number in range(2):
        assert starts(tmp_path / "sweep", number)[1][1] == str(tmp_path / "sweep" / str(number))
    assert len(jobs_of(tmp_path / "sweep")) == 5


def test_search__invalid_settings_are_refused(tmp_path):
    for options, sentence in (
        (("optimizer.lr=1,2",), "add the key to the sweep's space"),
        (("hydra.sweeper.prune=mean",), "choose median, halving or null"),
        (
            ("hydra.sweeper.metric=val/f1", "hydra.sweeper.trials=1", "epochs=1"),
            "not in a job's results; choose from val/top1, epochs",
        ),
    ):
        result = run("train.py", "-m", "sweep=lr_wd", *options, logs=tmp_path) if len(options) == 1 else None
        text = result.stderr if result else toy(*SEARCH, *options, logs=tmp_path).stderr
        assert sentence in text, text


def test_launcher__without_a_multirun_is_refused(tmp_path):
    result = run("train.py", "launcher=slurm", logs=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: launcher=slurm: launchers need a multirun: add -m, even for one job.\n"


@pytest.mark.slow
def test_search__with_real_trainings(tmp_path):
    options = ("hydra.sweeper.trials=3", "hydra.launcher.parallel=2", *QUICK)
    result = run("train.py", "-m", "sweep=lr_wd", *options, logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    directory = sweep_directory(tmp_path)
    for trial, job in zip(study_of(directory).trials, jobs_of(directory), strict=True):
        config = yaml.safe_load((directory / str(job["number"]) / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == pytest.approx(trial.params["optimizer.lr"])
        assert 1e-4 <= config["optimizer"]["lr"] <= 4e-3
        assert trial.value == job["results"]["val/top1"]


@pytest.mark.slow
def test_ray__runs_the_jobs(tmp_path):
    pytest.importorskip("ray")
    result = toy("launcher=ray", "seed=12,13,14,15", "hydra.launcher.parallel=2", logs=tmp_path)
    assert result.returncode == 1
    assert "2 of 4 jobs failed" in result.stderr
    assert [job["status"] for job in jobs_of(sweep_directory(tmp_path))] == [0, 1, -9, 0]


@pytest.mark.slow
def test_search__of_segmentation_runs_optimises_miou(tmp_path):
    root = masked.write_folder(tmp_path / "data")
    options = (*masked.SMALL, f"data.root={root}", "epochs=1", "hydra.sweeper.trials=2", "hydra.launcher.parallel=2")
    result = run("train.py", "-m", "sweep=lr_wd", *options, logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    directory = sweep_directory(tmp_path)
    values = [trial.value for trial in study_of(directory).trials]
    assert values == [job["results"]["val/mIoU"] for job in jobs_of(directory)]
    table = result.stdout.split("2 jobs in")[1]
    assert "val/mIoU" in table
    assert "top1" not in table
