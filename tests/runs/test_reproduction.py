"""`reproduce=<run>` repeats a run, bit for bit on one CPU process, and reports differences."""

import json
import re

import yaml

from programs import QUICK, error_of, metrics, run, run_directories, train
from vitrail.runs.reproduction import changes, comparison


def test_reproduce__same_metrics_in_a_new_run(tmp_path):
    first = train(*QUICK, "model.drop_path_rate=0.1", "augment=deit", "seed=7", logs=tmp_path)
    result = run("train.py", f"reproduce={first}", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Identical, to the last digit written." in result.stdout
    again = run_directories(tmp_path)[-1]
    assert again != first
    kept = [{key: value for key, value in row.items() if "speed" not in key} for row in metrics(first)]
    assert kept == [{key: value for key, value in row.items() if "speed" not in key} for row in metrics(again)]
    config = yaml.safe_load((again / "config.yaml").read_text())
    assert (config["seed"], config["model"]["drop_path_rate"], config["resume"]) == (7, 0.1, None)
    assert config["callbacks"]["preemption"]["path"] == f"{again}/checkpoints/last.ckpt"
    assert json.loads((again / "results.json").read_text())["reproduced"] is True


def test_reproduce__reports_differences(tmp_path):
    first = train(*QUICK, logs=tmp_path)
    versions = yaml.safe_load((first / "versions.yaml").read_text())
    versions["packages"]["timm"] = "0.1"
    (first / "versions.yaml").write_text(yaml.safe_dump(versions))
    result = run("train.py", f"reproduce={first}", "optimizer.lr=3e-2", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"changed since that run: timm 0\.1, now 1\.", result.stdout)
    assert "Not identical; see the table." in result.stdout
    assert json.loads((run_directories(tmp_path)[-1] / "results.json").read_text())["reproduced"] is False


def test_comparison__nan_equals_nan(tmp_path):
    for name, losses in (("one", "1.0 nan"), ("two", "1.0 nan"), ("three", "1.0 0.5"), ("four", "1.0")):
        (tmp_path / name).mkdir()
        rows = "".join(f"{epoch},{loss}\n" for epoch, loss in enumerate(losses.split()))
        (tmp_path / name / "metrics.csv").write_text(f"epoch,train/loss\n{rows}")
    found = {name: comparison(tmp_path / "one", tmp_path / name)[1] for name in ("two", "three", "four")}
    assert found == {"two": True, "three": False, "four": False}


def test_reproduce__missing_run_is_refused(tmp_path):
    assert "reproduce=/nowhere: not a run directory" in error_of(run("train.py", "reproduce=/nowhere", logs=tmp_path))


def test_changes__one_line_each():
    before = {"commit": "a", "python": "3.11", "platform": "x", "packages": {"torch": "1", "timm": "1"}}
    now = {"commit": "b", "python": "3.11", "platform": "x", "packages": {"torch": "2", "numpy": "2"}}
    assert changes(before, now) == [
        *("commit a, now b", "numpy not installed, now 2", "timm 1, now not installed", "torch 1, now 2")
    ]
