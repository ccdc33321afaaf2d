"""Token labelling with src/train.py, on real JPEGs."""

import csv

import pytest
import torch

from programs import error_of, run, train

SMALL = (
    "model=lvvit",
    "model.name=lvvit_t",
    "+model.embed_dim=32",
    "+model.depth=2",
    "+model.num_heads=2",
    "model.patch_size=8",
)
DATA = ("data=imagefolder", "data.image_size=32", "data.batch_size=8", "data.num_workers=0")
QUICK = ("trainer=cpu", "callbacks.model_summary=null", "augment=lvvit", "objective=token_labeling")


def losses(directory):
    with (directory / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "model", [SMALL, ("model=t2t_vit", "model.name=t2t_vit_7", "+model.depth=2", "model.token_head=true")]
)
def test_train__token_loss_decreases(model, image_tree, label_maps, tmp_path):
    arguments = (*model, *DATA, *QUICK, f"data.root={image_tree}", f"data.label_maps={label_maps}", "epochs=10")
    rows = losses(train(*arguments, "optimizer.lr=3e-3", "augment.auto_augment=null", logs=tmp_path))
    assert rows[-1]["train/token_loss"] < 0.9 * rows[0]["train/token_loss"]
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/cls_loss"] + row["train/token_loss"], rel=1e-4)


def test_train__missing_label_maps_are_refused(image_tree, tmp_path):
    common = (*SMALL, *DATA, *QUICK, f"data.root={image_tree}", "epochs=1")
    message = error_of(run("train.py", *common, "data.label_maps=/nowhere", logs=tmp_path))
    assert "data.label_maps=/nowhere: no label maps (no manifest.json)" in message


def test_train__image_without_a_label_map_is_named(image_tree, label_maps, tmp_path):
    (image_tree / "train" / "flower" / "flower_0.jpg").rename(image_tree / "train" / "flower" / "new.jpg")
    common = (*SMALL, *DATA, *QUICK, f"data.root={image_tree}", f"data.label_maps={label_maps}", "epochs=1")
    message = error_of(run("train.py", *common, logs=tmp_path))
    assert (
        "1 of 16 images have no map, the first is flower/new; annotate this data, or set data.on_missing_map=ignore"
        in message
    )
    result = run("train.py", *common, "data.on_missing_map=ignore", logs=tmp_path)
    assert result.returncode == 0
    assert "1 of 16 images have no label map" in result.stdout + result.stderr


def test_finetune__from_weights_of_another_resolution(image_tree, label_maps, tmp_path):
    common = (*SMALL, *QUICK, f"data.root={image_tree}", f"data.label_maps={label_maps}", "epochs=1")
    first = train(*DATA, *common, logs=tmp_path)
    larger = (*DATA, *common, "data.image_size=48", f"init_from={first}", "optimizer.lr=0", "schedule.warmup_lr=0")
    second = train(*larger, "schedule.min_lr=0", logs=tmp_path)
    assert "position embeddings resized from 4x4 to 6x6" in (second / "train.log").read_text()
    before, after = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (first, second))
    for key in ("model.head.weight", "model.aux_head.weight", "model.blocks.0.attn.qkv.weight"):
        torch.testing.assert_close(after["current_model_state"][key], before["state_dict"][key])


@pytest.mark.parametrize(
    ("experiment", "given", "message"),
    [
        ("lvvit_s", (), "data.label_maps: not set; this experiment needs a folder of label maps, data.label_maps=..."),
        (
            "lvvit_s_384",
            ("data.label_maps=x",),
            "init_from: not set; this experiment needs weights to start from, init_from=...",
        ),
    ],
)
def test_experiment__names_the_required_keys(experiment, given, message, image_tree, tmp_path):
    arguments = (f"experiment={experiment}", "trainer=cpu", *DATA, f"data.root={image_tree}", *given)
    assert message in error_of(run("train.py", *arguments, logs=tmp_path))
