"""Backbone, data, augmentation and objective of somebody else, with as few keys as possible, through the programs."""

import json

import pytest

import vitrail
from programs import QUICK, error_of, run, run_directories, train

PACKAGE = '''
import numpy as np
from PIL import Image
from timm.models import create_model
from torch import nn
from vitrail.types import Sample

open("imported", "w").close()


class Stripes:
    """In-memory data without mean, standard deviation or numpy labels."""

    classes = ("dark", "bright")

    def prepare(self):
        pass

    def open(self, split):
        return Split(split, 64 if split == "train" else 20)


class Split:
    def __init__(self, name, count):
        self.name, self.labels = name, np.arange(count) % 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(np.full((32, 32, 3), 60 + 120 * (index % 2) + index, dtype=np.uint8))
        return Sample(image, int(self.labels[index]), f"{self.name}/{index}")

    def keys(self):
        return [f"{self.name}/{index}" for index in range(len(self))]


def backbone():
    """A function without arguments."""
    return nn.Sequential(create_model("resnet10t", num_classes=2))


class Pair(nn.Module):
    """A backbone that does not return what it should."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 4)

    def forward(self, images):
        return self.layer(images), 0
'''
FILES = {
    "theirs.py": PACKAGE,
    "conf/model/own.yaml": "_target_: theirs.backbone\n",
    "conf/model/pair.yaml": "_target_: theirs.Pair\n",
    "conf/data/own.yaml": (
        "_target_: vitrail.data.ImageDataModule\nsource:\n  _target_: theirs.Stripes\n"
        "image_size: [32, 64]\nbatch_size: 16\nnum_workers: 1\n"
    ),
    "conf/augment/own.yaml": "_target_: vitrail.data.Augmentation\nscale: [0.5, 1.0]\neval_interpolation: bilinear\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    options = ("--allow", "theirs", "--config-dir", str(folder / "conf"))
    return train(*options, *QUICK, "model=own", "data=own", "augment=own", logs=folder)


def test_run__can_be_evaluated_and_exported(finished, folder):
    result = run("eval.py", "--allow", "theirs", f"ckpt={finished}", "trainer=cpu", logs=folder)
    assert result.returncode == 0, result.stderr
    evaluated = run_directories(folder, "eval")[-1]
    assert json.loads((evaluated / "results.json").read_text())["raw"]["images"] == 20
    result = run("export.py", "--allow=theirs", f"ckpt={finished}", "to=torch_export", logs=folder)
    assert result.returncode == 0, result.stderr
    assert (finished / "export" / "torch_export").stat().st_mode == finished.stat().st_mode  # others may read it
    refused = run("export.py", "--allow=theirs", f"ckpt={finished}", "to=hub", logs=folder)
    assert "backbone is not a network of timm; to=onnx and to=torch_export" in error_of(refused)
    assert not (finished / "export" / "hub").exists()


def test_run__can_be_a_teacher(finished, folder):
    options = ("--allow", "theirs", "--config-dir", str(folder / "conf"), *QUICK, "model=deit_nano", "data=own")
    train(*options, "objective=distillation", "teacher=run", f"teacher.ckpt={finished}", logs=folder)


def test_run__records_its_input(finished, folder, monkeypatch):
    monkeypatch.setenv("VITRAIL_TARGETS", "theirs")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    spec = vitrail.load_run(finished).input
    assert (spec.size, spec.mean, spec.interpolation) == ((32, 64), (0.485, 0.456, 0.406), "bilinear")


def test_code_of_a_run__is_not_imported_unless_allowed(finished, folder):
    (folder / "imported").unlink(missing_ok=True)
    for program in ("eval.py", "export.py"):
        refused = run(program, f"ckpt={finished}", logs=folder, PYTHONPATH=str(folder))
        assert "theirs.backbone is not in a package that a config may build from" in error_of(refused)
    refused = run("train.py", "~model", "+model={_target_: theirs.backbone}", logs=folder, PYTHONPATH=str(folder))
    assert "add --allow theirs" in error_of(refused)
    assert not (folder / "imported").exists()


def test_backbone__that_returns_the_wrong_thing_is_refused(folder):
    options = ("--allow", "theirs", "--config-dir", str(folder / "conf"))
    refused = run("train.py", *options, *QUICK, "model=pair", logs=folder)
    assert "model: returns tuple as cls for two images" in error_of(refused)


@pytest.mark.parametrize("arguments", [("--allow", "model=vit_nano"), ("model=vit_nano", "--allow"), ("--allow=",)])
def test_allow__needs_a_name(arguments, tmp_path):
    assert "must be followed by the name of a package or module" in error_of(
        run("train.py", *arguments, *QUICK, logs=tmp_path)
    )
