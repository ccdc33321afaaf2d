"""Modules that an objective trains, and Muon: exact resume, and what checkpoints and exports contain."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from programs import run, run_directories
from resuming import assert_same_state, fit, new_folder
from vitrail.models import create_model
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.models.teacher import Teacher
from vitrail.objectives import FeatureDistillation
from vitrail.training import CosineSchedule, ImageClassifier, OptimizerFactory, TargetBuilder
from vitrail.types import Batch

HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def taught(tmp_path):
    """Options of feature distillation from a network of another width and grid, without classes of the data."""
    torch.save(create_model("lvvit_nano", 3, 64).state_dict(), tmp_path / "teacher.pth")
    options = ("objective=feature_distillation", "teacher=timm", "teacher.name=lvvit_nano", "teacher.image_size=64")
    return (*options, "teacher.num_classes=3", f"teacher.weights={tmp_path}/teacher.pth", "objective.kind=mse")


@pytest.mark.parametrize("optimizer", ["muon", "nadamuon"])
@pytest.mark.sample(2)
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


class Batches(L.LightningDataModule):
    batch_size = 8

    def train_dataloader(self):
        random = torch.Generator().manual_seed(0)
        images, labels = torch.randn(3, 8, 3, 32, 32, generator=random), torch.arange(24).reshape(3, 8) % 5
        content = [Batch(*pair, [""] * 8) for pair in zip(images, labels, strict=True)]
        return torch.utils.data.DataLoader(content, batch_size=None)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def test_feature_distillation__equals_a_plain_loop(tmp_path):
    """30 steps from the same weights and batches; the teacher has twice the grid."""
    torch.manual_seed(0)
    model, network = create_model("deit_nano", 5, 32, patch_size=8), create_model("deit_nano", 0, 32)
    torch.nn.init.trunc_normal_(model.head.weight, std=0.02)
    teacher = Teacher(PretrainedClassifier(network, "teacher", (32, 32), *HALF), *HALF)
    reference = copy.deepcopy(model).train()
    optimizer, schedule = OptimizerFactory("adamw", 1e-3, 0.05, "none"), CosineSchedule(0, min_lr=1e-3)
    objective, targets = FeatureDistillation("mse", weight=0.5), TargetBuilder(teacher=teacher)
    module = ImageClassifier(model, objective, 5, optimizer, schedule, targets=targets)
    projection = copy.deepcopy(module.objective.projection)
    losses = Losses()
    L.Trainer(
        max_epochs=10, accelerator="cpu", callbacks=[losses], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, datamodule=Batches())  # fmt: skip

    exempt = {"cls_token", "pos_embed"}
    named = [*reference.named_parameters(), *((f"projection.{key}", p) for key, p in projection.named_parameters())]
    groups = [
        {"params": [p for key, p in named if (p.ndim > 1 and key not in exempt) == decayed], "weight_decay": amount}
        for decayed, amount in ((True, 0.05), (False, 0.0))
    ]
    plain, expected = torch.optim.AdamW(groups, lr=1e-3), []
    for step in range(30):
        images, labels = list(Batches().train_dataloader())[step % 3][:2]
        features = reference.forward_features(images)
        with torch.no_grad():
            planes = network.forward_features(images)[:, 1:].transpose(1, 2).reshape(8, -1, 8, 8)
            wanted = F.interpolate(planes, (4, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
            wanted = F.layer_norm(wanted, wanted.shape[-1:])
        loss = F.cross_entropy(reference.forward_head(features), labels, label_smoothing=0.1)
        loss = loss + 0.5 * (projection(features[:, 1:]) - wanted).square().mean()
        plain.zero_grad()
        loss.backward()
        plain.step()
        expected.append(loss.item())
    assert expected[-1] < expected[0]
    assert losses.values == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(module.objective.projection.weight, projection.weight, rtol=1e-3, atol=1e-5)
