"""Checkpoints and data that no longer belong together: every program compares the names of the classes."""

import shutil

import numpy as np
import pytest
from PIL import Image

from programs import QUICK, error_of, metrics, run, train

CLASSES = ("apple", "bread", "cheese")
SMALL = ("data=imagefolder", "model=vit_nano", "data.image_size=32", "data.batch_size=4", "data.num_workers=0")


def write_images(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(CLASSES):
            for index in range(count):
                path = root / split / name / f"{split}{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(80 * number, 80 * number + 80, (32, 32, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on three classes, its export, its logs folder, and the same images with `apple` called `zebra`."""
    folder = tmp_path_factory.mktemp("changed")
    root, renamed = write_images(folder / "data"), write_images(folder / "renamed")
    for split in ("train", "val"):
        (renamed / split / "apple").rename(renamed / split / "zebra")
    directory = train(*QUICK, *SMALL, f"data.root={root}", logs=folder)
    assert run("export.py", f"ckpt={directory}", "to=hub", f"out={folder}/hub", logs=folder).returncode == 0
    return directory, folder / "hub", folder, renamed


DIFFERENCE = "the data's classes are not the checkpoint's: 1 missing (apple), 1 new (zebra)"


def test_resume__renamed_class_is_refused(finished, tmp_path):
    directory, _, logs, renamed = finished
    copied = tmp_path / "run"
    shutil.copytree(directory, copied)
    before = (copied / "config.yaml").read_text(), len(metrics(copied))
    message = error_of(run("train.py", f"resume={copied}", f"+data.root={renamed}", "epochs=2", logs=logs))
    assert f"resume={copied}: {DIFFERENCE}" in message
    assert ((copied / "config.yaml").read_text(), len(metrics(copied))) == before


def test_reproduce__renamed_class_is_refused(finished):
    directory, _, logs, renamed = finished
    message = error_of(run("train.py", f"reproduce={directory}", f"+data.root={renamed}", logs=logs))
    assert f"reproduce={directory}: {DIFFERENCE}" in message


@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
def test_eval__renamed_class_is_refused(exported, finished):
    directory, hub, logs, renamed = finished
    if exported:
        data = (f"ckpt={hub}", "data=imagefolder", f"data.root={renamed}", "data.num_workers=0")
    else:
        data = (f"ckpt={directory}", f"+data.root={renamed}")
    message = error_of(run("eval.py", *data, logs=logs))
    assert "data: 1 of its 3 classes are not among the checkpoint's 3 classes; the first is zebra" in message


@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
def test_finetuning__classifier_of_other_classes_is_not_loaded(exported, finished):
    directory, hub, logs, renamed = finished
    source = hub if exported else directory
    result = run("train.py", *QUICK, *SMALL, f"data.root={renamed}", f"init_from={source}", logs=logs)
    assert result.returncode == 0, result.stderr
    assert f"{DIFFERENCE}: head not loaded." in " ".join(result.stdout.split())


def test_teacher__of_other_classes_is_refused(finished):
    directory, _, logs, renamed = finished
    taught = (
        "objective=distillation",
        "teacher=run",
        f"teacher.ckpt={directory}",
        "model=vit",
        "model.name=deit_nano_distilled",
    )
    small = tuple(item for item in SMALL if not item.startswith("model"))
    message = error_of(run("train.py", *QUICK, *small, *taught, f"data.root={renamed}", logs=logs))
    assert "teacher: 1 of the data's 3 classes are not among those of vit_nano (zebra" in message
    assert "teacher.classes=data" in message
    done = run("train.py", *QUICK, *small, *taught, f"data.root={renamed}", "teacher.classes=data", logs=logs)
    assert done.returncode == 0, done.stderr


def test_annotator__of_other_classes_makes_maps_that_are_not_trained_on(finished, tmp_path):
    directory, _, logs, renamed = finished
    options = ("data=imagefolder", f"data.root={renamed}", "num_workers=0", "top_k=2", f"out={tmp_path}/maps")
    done = run("annotate.py", "annotator=run", f"annotator.ckpt={directory}", *options, logs=logs)
    assert done.returncode == 0, done.stderr
    assert "these maps are for viewing only" in " ".join(done.stdout.split())
    labelled = (
        "objective=token_labeling",
        "augment=lvvit",
        "model.token_head=true",
        f"data.label_maps={tmp_path}/maps",
    )
    message = error_of(run("train.py", *QUICK, *SMALL, f"data.root={renamed}", *labelled, logs=logs))
    assert "classes differ" in message
