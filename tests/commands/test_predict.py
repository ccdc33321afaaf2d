"""`python src/predict.py`: files of predictions, pictures, unreadable images and exit status."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import vitrail
from programs import QUICK, error_of, run, train, train_and_export
from vitrail.data.label_maps import LabelMapStore
from vitrail.reporting.predictions import prediction_writer
from vitrail.runs.prediction import predictions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("logs"))


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predict__equals_a_plain_timm_loop_on_the_export(finished, image_tree, tmp_path):
    directory, hub = finished
    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    files = sorted(image_tree.rglob("*.jpg"))
    with torch.inference_mode():
        expected = torch.stack([model(transform(Image.open(file))[None])[0].softmax(-1) for file in files])
    arguments = (f"images={image_tree}", "num_workers=1", "batch_size=8", "top_k=10")
    for ckpt, out in ((directory, "run.csv"), (hub, "hub.jsonl"), (directory, "run.parquet")):
        result = run("predict.py", f"ckpt={ckpt}", *arguments, f"out={tmp_path / out}", logs=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (tmp_path / "hub.jsonl").read_text().splitlines()]
    table = rows_of(tmp_path / "run.csv")
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "run.parquet").to_pylist()
    for index, file in enumerate(files):
        best = expected[index].sort(descending=True)
        for found in (table[index], parquet[index]):
            assert found["image"] == str(file)
            assert [int(found[f"class_{rank}"]) for rank in range(1, 11)] == best.indices.tolist()
            shares = [float(found[f"probability_{rank}"]) for rank in range(1, 11)]
            assert shares == pytest.approx(best.values.tolist(), abs=1e-5)
        assert lines[index]["image"] == str(file)
        assert [item["probability"] for item in lines[index]["predictions"]] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )


def test_predict__unreadable_images_are_skipped_and_listed(finished, image_tree, tmp_path):
    (image_tree / "val" / "<b>broken.jpg").write_bytes(b"nothing")
    os.mkfifo(image_tree / "val" / "pipe.jpg")
    (image_tree / "val" / "flower" / "up").symlink_to("..")
    arguments = (f"ckpt={finished[0]}", f"images={image_tree / 'val'}", "num_workers=0", "batch_size=2", "top_k=3")
    result = run("predict.py", *arguments, "out=found.csv", "overlay=pictures", logs=tmp_path)
    assert result.returncode == 1
    assert "1 of 7 images skipped, listed in found_skipped.txt" in result.stdout
    assert "broken.jpg: not a readable image" in (tmp_path / "found_skipped.txt").read_text()
    assert len(rows_of(tmp_path / "found.csv")) == 6
    drawn = sorted(path.relative_to(tmp_path / "pictures") for path in (tmp_path / "pictures").rglob("*.jpg"))
    assert [str(path) for path in drawn] == [
        f"{name}/{name}_{number}.jpg" for name in ("flower", "pagoda") for number in range(3)
    ]
    with Image.open(tmp_path / "pictures" / drawn[0]) as picture:
        assert picture.width == 480
        assert picture.height > 260  # the image of 300 x 260 pixels, and three lines below it
    assert not list(tmp_path.glob(".found*"))
    again = run("predict.py", *arguments, "out=found.csv", f"overlay={image_tree}", logs=tmp_path)
    assert "contains some of the images" in error_of(again)


def test_predict__pipes_are_not_opened(finished, tmp_path):
    """Reading a pipe would wait for its writer for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text("pipe.jpg\n")
    for images in ("*.jpg", "list.txt", "pipe.jpg"):
        result = run("predict.py", f"ckpt={finished[0]}", f"images={images}", "num_workers=0", logs=tmp_path)
        assert "pipe.jpg: not a regular file" in error_of(result)
    with pytest.raises(vitrail.errors.ImageError, match=r"pipe\.jpg: not a regular file"):
        vitrail.load_run(finished[0]).predict(tmp_path / "pipe.jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "images: not set; write images=..., --help describes it."),
        (("images=broken", "ckpt=null"), "ckpt: not set; set it to a run, an exported folder or"),
        (("images=/nowhere",), "images=/nowhere: no such file or folder."),
        (("images=empty",), "images=empty: contains no images, at any depth."),
        (("images=broken", "num_workers=0"), "images=broken: no image can be read; the first: broken/a.jpg"),
        (("images=broken", "out=x.xls"), "out=x.xls: must end with one of .csv, .jsonl, .parquet."),
        (("images=broken", "device=gpu"), "device=gpu: no such device"),
        (("images=broken", "weights=last"), "weights=last: choose best, ema, raw."),
        (("images=broken", "top_k=0"), "top_k=0: "),
        (("images=broken", "model=vit_nano"), "omit model="),
    ],
)
def test_predict__bad_input(finished, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"nothing")
    result = run("predict.py", f"ckpt={finished[0]}", *arguments, logs=tmp_path)
    assert message in error_of(result)
    assert not list(tmp_path.glob("*predictions*"))


NAMES = ("<b>b", "[red] a", os.fsdecode(b"caf\xe9"))  # folders
CLASSES = [*NAMES[:2], r"caf\xe9"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """An LV-ViT of two steps with label maps, of three classes whose names and files are hard to print."""
    logs = tmp_path_factory.mktemp("labelled")
    root = logs / "images"
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{number}.jpg")
    keys = [f"{name}/{name}_{number}" for name in CLASSES for number in range(4)]
    writer = LabelMapStore.create(logs / "maps", len(keys), 1, (4, 4), 3, keys, class_names=CLASSES)
    for index in range(len(keys)):
        writer.write(index, np.full((1, 4, 4), 8.0), np.full((1, 4, 4), index // 4))
    writer.finish()
    maps = ("objective=token_labeling", "model.token_head=true", f"data.label_maps={logs / 'maps'}")
    size = ("data.image_size=32", "data.batch_size=4", "data.num_workers=0")
    arguments = (*QUICK, "data=imagefolder", f"data.root={root}", "model=lvvit_nano", *maps, *size)
    return train(*arguments, logs=logs), root


@pytest.mark.parametrize("out", ["found.csv", "found.jsonl", "found.parquet"])
def test_predict__names_that_are_hard_to_print(labelled, tmp_path, out):
    directory, root = labelled
    images = tmp_path / "images"
    shutil.copytree(root / "val", images)
    (images / NAMES[2] / os.fsdecode(b"bro[red]ken\xe9.jpg")).write_bytes(b"nothing")
    arguments = (f"ckpt={directory}", f"images={images}", "num_workers=0", "overlay=pictures", "explain=attention")
    result = run("predict.py", *arguments, f"out={out}", logs=tmp_path)
    assert result.returncode == 1, result.stderr
    broken = r"caf\xe9/bro[red]ken\xe9.jpg: not a readable image"
    assert broken in " ".join(result.stdout.split())
    assert broken in (tmp_path / "found_skipped.txt").read_text()
    drawn = {str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.jpg")}
    assert drawn == {f"{name}/{name}_{number}.jpg" for name in NAMES for number in range(4)}
    if out.endswith(".csv"):
        classes = {row[f"class_{rank}"] for row in rows_of(tmp_path / out) for rank in (1, 2, 3)}
    elif out.endswith(".jsonl"):
        lines = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
        classes = {item["class"] for line in lines for item in line["predictions"]}
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / out)
        classes = {name for rank in (1, 2, 3) for name in table[f"class_{rank}"].to_pylist()}
    assert classes == {*CLASSES}


def test_predict__explanations_below_each_picture(labelled, tmp_path):
    """Only images that were annotated have a label map: those of the other split are named alike."""
    directory, root = labelled
    arguments = (f"ckpt={directory}", f"images={root}", "num_workers=0", "overlay=pictures", "top_k=1")
    kinds = "explain=[attention,rollout,gradient,tokens]"
    result = run("predict.py", *arguments, kinds, logs=tmp_path)
    assert result.returncode == 0, result.stderr
    for split, columns in (("train", 6), ("val", 5)):  # image, four maps, perhaps the label map; and the legend
        for name in NAMES:
            with Image.open(tmp_path / "pictures" / split / name / f"{name}_0.jpg") as picture:
                assert picture.width == 6 + columns * 174 + 236
    copies = tmp_path / "train" / NAMES[0]
    shutil.copytree(root / "train" / NAMES[0], copies)
    result = run("predict.py", arguments[0], f"images={copies.parent}", "overlay=copies", kinds, logs=tmp_path)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "copies" / f"{NAMES[0]}_0.jpg") as picture:
        assert picture.width == 6 + 5 * 174 + 236


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain=attention",), "explain=attention: set overlay=<folder> to write the pictures to."),
        (("explain=kept", "overlay=o"), "explain=kept: "),
        (("explain=[attention,heat]", "overlay=o"), "explain=heat: cannot be drawn; choose from attention, rollout"),
    ],
)
def test_predict__explanations_that_cannot_be_drawn(labelled, tmp_path, arguments, message):
    """The message comes before any image is read: this one cannot be."""
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    result = run("predict.py", f"ckpt={labelled[0]}", f"images={tmp_path / 'a.jpg'}", *arguments, logs=tmp_path)
    assert message in error_of(result)


@pytest.mark.slow
def test_predict__ten_thousand_images_in_constant_memory(finished, image_tree, tmp_path):
    trained = vitrail.load_run(finished[0])
    images = [str(next(image_tree.rglob("*.jpg")))] * 10_000
    results = predictions(trained.model, trained.input, trained.class_names, images, batch_size=64, num_workers=1)
    with prediction_writer(tmp_path / "found.csv", 5) as write:
        for number, result in enumerate(results, start=1):
            write(result.image, result.classes, result.probabilities)
            if number == 1000:
                before = _resident_bytes()
        assert _resident_bytes() - before < 20 * 2**20
    assert len(rows_of(tmp_path / "found.csv")) == 10_000


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
