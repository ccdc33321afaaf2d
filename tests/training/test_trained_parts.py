"""Modules that an objective trains, and Muon: exact resume, and what checkpoints and exports contain."""

import pytest
import torch
from safetensors.torch import load_file

from programs import run, run_directories
from resuming import assert_same_state, fit, new_folder
from vitrail.models import create_model


@pytest.fixture
def taught(tmp_path):
    """Options of feature distillation from a network of another width and grid, without classes of the data."""
    torch.save(create_model("lvvit_nano", 3, 64).state_dict(), tmp_path / "teacher.pth")
    options = ("objective=feature_distillation", "teacher=timm", "teacher.name=lvvit_nano", "teacher.image_size=64")
    return (*options, "teacher.num_classes=3", f"teacher.weights={tmp_path}/teacher.pth", "objective.kind=mse")


@pytest.mark.parametrize("optimizer", ["muon", "nadamuon"])
def test_resume__from_a_step_within_an_epoch_gives_the_same_bits(optimizer, taught, image_tree, tmp_path):
    more = (f"optimizer={optimizer}", "optimizer.momentum=0.9", *(taught if optimizer == "nadamuon" else ()))
    copies = new_folder(tmp_path / "copies")
    expected = fit(tmp_path / "whole", image_tree, copies=copies, more=more)
    assert ("objective.projection.weight" in expected["state_dict"]) == (optimizer == "nadamuon")
    states = expected["optimizer_states"][0]["state"].values()
    assert {state["use_muon"] for state in states} == {True, False}
    for step in ("02", "07"):
        resumed = fit(tmp_path / step, image_tree, ckpt=copies / f"{step}.ckpt", more=more)
        assert_same_state(resumed, expected, step)


def test_export__leaves_the_projection_out(taught, image_tree, tmp_path):
    options = (*taught, "objective.weight=0.5", "data=imagefolder", f"data.root={image_tree}", "data.image_size=32")
    options += ("data.batch_size=4", "data.num_workers=0", "model=deit_nano", "trainer=cpu", "epochs=1")
    result = run("train.py", *options, "optimizer=muon", "callbacks.model_summary=null", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Muon: blocks.*.attn.proj.weight" in result.stdout
    (directory,) = run_directories(tmp_path)
    checkpoint = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert checkpoint[part]["objective.projection.weight"].shape == (64, 64)
    for program, more in (("export.py", "to=safetensors"), ("eval.py", "trainer=cpu")):
        result = run(program, f"ckpt={directory}", more, logs=tmp_path)
        assert result.returncode == 0, result.stderr
    weights = load_file(directory / "export" / "safetensors" / "model.safetensors")
    assert weights.keys() == create_model("deit_nano", 2, 32).state_dict().keys()
