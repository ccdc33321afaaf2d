"""Runs that version 0.1 recorded (tests/version_0_1) still resume, evaluate, export and reproduce.

Recorded with commit 3f5c187: LV-ViT-nano of depth 1 with MixToken on label maps of the digits, and DeiT-nano of depth 1
with mixup, CutMix, RandAugment, erasing and gradient checkpointing. Both trained two epochs; `evaluation.json` is what
that commit's eval.py gave, and `resumed_metrics.csv` what it logged when it resumed for a third epoch.
"""

import csv
import json
import shutil

import pytest
import yaml

import vitrail
from programs import PROJECT, metrics, run
from vitrail_runtime.renames import upgraded

RECORDED = PROJECT / "tests" / "version_0_1"
RUNS = pytest.mark.parametrize("name", ["tokens", "mixup"])


@pytest.fixture
def recorded(name, tmp_path):
    """A copy of the run, which a test may continue."""
    return shutil.copytree(RECORDED / name, tmp_path / "run")


@RUNS
def test_resume__logs_what_version_0_1_logged(name, recorded, tmp_path):
    maps = ["+data.label_maps=" + str(RECORDED / "maps")] if name == "tokens" else []
    result = run("train.py", f"resume={recorded}", "epochs=3", *maps, logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    with (recorded / "resumed_metrics.csv").open() as file:
        expected = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    found = metrics(recorded)
    assert len(found) == len(expected) == 3
    for row, before in zip(found, expected, strict=True):
        for key in (key for key in before if not key.startswith("speed/")):
            assert row[key] == pytest.approx(before[key], rel=1e-4), key


@RUNS
def test_eval__gives_what_version_0_1_gave(name, recorded, tmp_path):
    result = run("eval.py", f"ckpt={recorded}", "trainer=cpu", logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (directory,) = (tmp_path / "eval" / "runs").iterdir()
    found, expected = (
        json.loads(path.read_text()) for path in (directory / "results.json", recorded / "evaluation.json")
    )
    for weights in ("raw", "ema"):
        assert found[weights] == pytest.approx(expected[weights], rel=1e-4)


@RUNS
def test_export__and_load_run(name, recorded, tmp_path):
    result = run("export.py", f"ckpt={recorded}", "to=torch_export", logs=tmp_path)  # compares the logits itself
    assert result.returncode == 0, result.stdout + result.stderr
    opened = vitrail.load_run(recorded)
    assert (opened.weights, opened.weight_sets, opened.classes) == ("ema", ("raw", "ema"), list("0123456789"))
    assert opened.input.size == (16, 16)


def test_reproduce__repeats_the_first_epochs(tmp_path):
    result = run("train.py", f"reproduce={RECORDED / 'mixup'}", logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (directory,) = (tmp_path / "train" / "runs").iterdir()
    for row, before in zip(metrics(directory), metrics(RECORDED / "mixup"), strict=True):
        for key in (key for key in before if not key.startswith("speed/")):
            assert row[key] == pytest.approx(before[key], rel=1e-4), key


@RUNS
def test_upgraded__is_todays_and_stays_as_it_is(name):
    config = upgraded(yaml.safe_load((RECORDED / name / "config.yaml").read_text()))
    assert config["data"]["source"] == {"_target_": "vitrail.data.sources.Digits"}
    assert config["model"]["token_head"] == (name == "tokens")
    assert {"preemption", "nonfinite_guard"} < set(config["callbacks"])
    assert config["grad_checkpointing"] == (name == "mixup")
    assert config["optimizer"]["backbone_lr_scale"] == (0.5 if name == "tokens" else 1.0)
    assert config["schedule"]["epoch_lag"] == (name == "mixup")
    mixing = {"tokens": "vitrail.data.MixToken", "mixup": "vitrail.data.MixupCutMix"}
    assert config["mixing"]["_target_"] == mixing[name]
    if name == "tokens":
        assert config["targets"]["smoothing"] == 0.1
        assert config["objective"] == {
            "_target_": "vitrail.objectives.TokenLabelingLoss",
            "token_weight": 1.0,
            "cls_weight": 1.0,
        }
    assert upgraded(json.loads(json.dumps(config))) == config
