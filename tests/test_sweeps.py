"""Multiruns in real processes."""

import json
from pathlib import Path

import pytest
import yaml

from programs import QUICK, metrics, run


def sweep_directory(logs: Path) -> Path:
    (directory,) = (logs / "train" / "multiruns").glob("*")
    return directory


def test_grid__fresh_process_a_job_also_with_ddp(tmp_path):
    """Lightning's launcher must not pass the sweep on to its ranks: two jobs of two ranks stay two jobs."""
    result = run(
        *("train.py", "-m", "trainer=ddp_cpu_2", "data.batch_size=16", "model=vit_nano,deit_nano", *QUICK[1:]),
        logs=tmp_path,
        LOCAL_RANK="0",  # what a parent under a launcher would hand down
    )
    assert result.returncode == 0, result.stdout + result.stderr
    directory = sweep_directory(tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == ["0", "1", "jobs.json", "multirun.yaml"]
    assert not (tmp_path / "train" / "runs").exists()
    for number, model in enumerate(("vit_nano", "deit_nano")):
        job = directory / str(number)
        assert not (job / "multirun.yaml").exists()
        assert yaml.safe_load((job / "config.yaml").read_text())["model"]["name"] == model
        assert len(metrics(job)) == 1
        assert metrics(job)[0]["step"] == 1  # two batches an epoch, counted from 0
    assert "deit_nano" in result.stdout.split("2 jobs in")[1]


def test_grid__a_failing_job_does_not_stop_the_others(tmp_path):
    result = run(
        *("train.py", "-m", "data.batch_size=16,17,18", "augment=deit", *QUICK, "hydra.launcher.parallel=2"),
        logs=tmp_path,
    )
    assert result.returncode == 1
    assert "1 of 3 jobs failed: job 1" in result.stderr
    jobs = json.loads((sweep_directory(tmp_path) / "jobs.json").read_text())
    assert [job["status"] for job in jobs] == [0, 1, 0]
    assert "data.batch_size=17: must be even" in (sweep_directory(tmp_path) / "1" / "console.log").read_text()
    assert "failed (1)" in result.stdout


def test_grid__misspelt_group_before_any_job(tmp_path):
    result = run("train.py", "-m", "model=vit_nano,vit_nanno", *QUICK, logs=tmp_path)
    assert result.returncode == 1
    assert "vit_nanno" in result.stderr
    assert not list((tmp_path / "train" / "multiruns").glob("*/0"))


def test_optuna__samples_in_the_parent(tmp_path):
    pytest.importorskip("optuna")
    result = run(
        *("train.py", "-m", "sweep=lr_wd", "hydra.sweeper.trials=3", "hydra.launcher.parallel=2", *QUICK), logs=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    directory = sweep_directory(tmp_path)
    jobs = json.loads((directory / "jobs.json").read_text())
    assert [job["number"] for job in jobs] == [0, 1, 2]
    rates = []
    for job in jobs:
        config = yaml.safe_load((directory / str(job["number"]) / "config.yaml").read_text())
        rates.append(config["optimizer"]["lr"])
        assert f"optimizer.lr={config['optimizer']['lr']}" in job["overrides"]
    assert len(set(rates)) == 3
    assert all(1e-4 <= rate <= 4e-3 for rate in rates)

    import optuna

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{directory / 'study.db'}")
    assert [trial.params["optimizer.lr"] for trial in study.trials] == pytest.approx(rates)
    assert [trial.value for trial in study.trials] == [job["results"]["val/top1"] for job in jobs]
