"""Segmentation as a user runs it: train, evaluate with several settings and processes, resume, check, bad input."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import masked
import vitrail
from programs import QUICK, error_of, metrics, run, run_directories, run_ranks, train
from vitrail.errors import ConfigError, ImageError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return masked.write_folder(tmp_path_factory.mktemp("masked") / "data")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    return train(*masked.SMALL, f"data.root={root}", logs=logs), logs


def evaluated(directory, logs, *options, ranks=1):
    trainer = "cpu" if ranks == 1 else "ddp_cpu_2"
    results = run_ranks("eval.py", f"ckpt={directory}", f"trainer={trainer}", *options, logs=logs, ranks=ranks)
    assert [result.returncode for result in results] == [0] * ranks, results[0].stderr
    assert "IoU [red]" in results[0].stdout
    folder = run_directories(logs, "eval")[-1]
    return json.loads((folder / "results.json").read_text())["raw"], folder


def test_evaluation__equals_the_training_s_validation_on_any_number_of_processes(finished):
    """3 images on two processes: one of them has a padding sample, which must not count."""
    directory, logs = finished
    best = max(row["val/mIoU"] for row in metrics(directory))
    single, folder = evaluated(directory, logs)
    assert single["mIoU"] == pytest.approx(best, abs=1e-3)
    assert (single["images"], single["inference"]) == (
        3,
        "window 64 x 64, stride 42 x 42, shorter side 64, single scale",
    )
    double, _ = evaluated(directory, logs, ranks=2)
    assert double == {**single, "mIoU": pytest.approx(single["mIoU"], abs=1e-4), "mAcc": pytest.approx(single["mAcc"])}
    with (folder / "classes_raw.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(masked.CLASSES)
    assert sum(float(row["iou"]) for row in rows) / 4 == pytest.approx(single["mIoU"], abs=0.01)


def test_programs_for_classifiers__refuse_it(finished, image_tree, root, tmp_path):
    directory, logs = finished
    refused = "ckpt={}: this network segments images; a classifier is needed here."
    options = ("annotator=run", f"annotator.ckpt={directory}", "data=imagefolder", f"data.root={image_tree}")
    assert refused.format(directory) in error_of(run("annotate.py", *options, f"out={tmp_path / 'maps'}", logs=logs))
    folder = ("data=imagefolder", f"+data.root={image_tree}")
    assert "data: has no masks" in error_of(run("eval.py", f"ckpt={directory}", *folder, logs=logs))
    classifier = train(*QUICK, "model=deit_nano", logs=tmp_path)
    asked = ("predict.py", f"ckpt={classifier}", f"images={image_tree}", "masks=here")
    assert f"masks=here: ckpt={classifier} is a classifier; omit masks." in error_of(run(*asked, logs=logs))
    masks = ("data=segmentation_folder", f"+data.root={root}")
    assert "is a classifier, but the data has masks" in error_of(
        run("eval.py", f"ckpt={classifier}", *masks, logs=logs)
    )


def table_of(path):
    """Return the rows of a table of predicted masks: image, mask, and the shares above 0."""
    if path.suffix == ".jsonl":
        return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    shares = [{name[6:]: round(float(row[name]), 6) for name in row if name.startswith("share_")} for row in rows]
    return [
        (row["image"], row["mask"], {name: share for name, share in found.items() if share})
        for row, found in zip(rows, shares, strict=True)
    ]


def predicted(ckpt, images, folder, *options):
    """Predict in a folder, and return the finished process."""
    result = run("predict.py", f"ckpt={ckpt}", f"images={images}", "num_workers=0", *options, logs=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_predict__the_masks_of_an_evaluation(finished, root, tmp_path, mode):
    """Of a run and of its export, at the settings of the training's validation."""
    directory, logs = finished
    if mode == "whole":
        settings = ("data.eval_mode=whole", "data.eval_scales=[0.75,1.0]", "data.eval_flip=true")
        directory = train(*masked.SMALL, f"data.root={root}", *settings, "epochs=1", logs=tmp_path)
    _, folder = evaluated(directory, logs, "masks=true")
    result = run("export.py", f"ckpt={directory}", f"out={tmp_path / 'exported'}", logs=logs)
    assert result.returncode == 0, result.stderr
    images = root / "images" / "val"
    for number, (ckpt, out) in enumerate(((directory, "a.csv"), (tmp_path / "exported", "a.jsonl"))):
        options = (f"masks=masks_{number}", "overlay=drawn", f"out={out}")
        assert "shorter side 64" in predicted(ckpt, images, tmp_path, *options).stdout
        rows = table_of(tmp_path / out)
        assert [row[:2] for row in rows] == [(str(images / f"picture_{n}.png"), f"picture_{n}.png") for n in range(3)]
        for _, name, shares in rows:
            with (
                Image.open(tmp_path / f"masks_{number}" / name) as mask,
                Image.open(folder / "masks_raw" / name) as known,
            ):
                assert (mask.mode, mask.size, mask.getpalette()) == ("P", (96, 72), known.getpalette())
                np.testing.assert_array_equal(mask, known)
                assert mask.histogram()[:4] == [round(shares.get(name, 0) * 96 * 72) for name in masked.CLASSES]
            with Image.open((tmp_path / "drawn" / name).with_suffix(".jpg")) as drawn:
                assert (drawn.width, drawn.height) == (96 + 8 + 236, max(72, 22 * len(shares)))


def test_predict__of_python_equals_the_program(finished, root, tmp_path):
    directory, _ = finished
    images = root / "images" / "val"
    predicted(directory, images, tmp_path, "out=a.parquet")
    rows = table_of(tmp_path / "a.parquet")
    trained = vitrail.load_run(directory)
    files = trained.predict(images)
    arrays = trained.predict([np.asarray(Image.open(image)) for image in sorted(images.iterdir())])
    for (image, name, shares), of_file, of_array in zip(rows, files, arrays, strict=True):
        assert image == of_file.image
        for result in (of_file, of_array):
            np.testing.assert_array_equal(result.mask, Image.open(tmp_path / "masks" / name))
            assert [round(share, 6) for share in result.shares] == [shares.get(name, 0) for name in masked.CLASSES]
    with pytest.raises(ConfigError, match="top_k: does not apply to a network that segments images; omit it"):
        trained.predict(images, top_k=3)
    with pytest.raises(ImageError, match=r"nowhere\.png: not a readable image"):
        trained.predict(["nowhere.png"])


def test_predict__unreadable_images_and_options_without_meaning(finished, root, tmp_path):
    directory, _ = finished
    images = tmp_path / "images"
    shutil.copytree(root / "images" / "val", images)
    (images / "picture_1.png").write_bytes(b"nothing")
    (images / "picture_2.png").rename(images / "version.2.png")
    arguments = ("predict.py", f"ckpt={directory}", f"images={images}", "num_workers=0")
    result = run(*arguments, logs=tmp_path)
    assert result.returncode == 1
    assert "1 of 3 images skipped, listed in predictions_skipped.txt" in result.stdout
    assert [name for _, name, _ in table_of(tmp_path / "predictions.csv")] == ["picture_0.png", "version.2.png"]
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["picture_0.png", "version.2.png"]
    result = run(*arguments, "masks=null", "out=without.jsonl", logs=tmp_path)
    assert [name for _, name, _ in table_of(tmp_path / "without.jsonl")] == ["", ""]
    for option, message in (
        ("top_k=3", "top_k: does not apply to a network that segments images; omit it."),
        ("batch_size=2", "batch_size: does not apply to a network that segments images"),
        ("masks=images", "masks=images: contains some of the images; choose another folder."),
    ):
        assert message in error_of(run(*arguments, option, logs=tmp_path)), option
    explain = ("explain=attention", "overlay=drawn")
    assert "explain: does not apply to a network that segments images" in error_of(
        run(*arguments, *explain, logs=tmp_path)
    )


def test_report__shows_the_classes_and_pictures(finished):
    directory, logs = finished
    score, _ = evaluated(directory, logs, "masks=true")
    result = run("report.py", f"runs={directory}", "out=one.html", logs=logs)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stdout
    (found,) = re.findall(r'id="data">(.*?)</script>', (logs / "one.html").read_text(), re.DOTALL)
    data = json.loads(found)
    (entry,) = data["runs"]
    assert data["metric"] == "val/mIoU"
    assert entry["best"] == pytest.approx(score["mIoU"], abs=1e-2)
    assert {*entry["pictures"]} == {"first_batch", "predictions"}
    (evaluation,) = entry["evaluations"]
    assert [name for name, *_ in evaluation["ious"]] == list(masked.CLASSES)
    assert sum(iou for _, iou, _ in evaluation["ious"]) / 4 == pytest.approx(score["mIoU"], abs=0.01)
    assert {*evaluation["pictures"]} == {"picture_0", "picture_1", "picture_2"}
    assert all(picture["data"] for picture in evaluation["pictures"].values())


def test_training__draws_images_with_predicted_masks_and_labels(finished):
    with Image.open(finished[0] / "predictions.png") as picture:
        assert picture.size == (6 + 3 * 174 + 236, 40 + 3 * 174)


def test_evaluation__at_several_scales_and_of_whole_images(finished):
    directory, logs = finished
    options = ("+data.eval_scales=[0.75,1.0]", "+data.eval_flip=true", "masks=true")
    several, folder = evaluated(directory, logs, *options)
    with Image.open(folder / "masks_raw" / "picture_0.png") as mask:
        assert (mask.mode, mask.size) == ("P", (96, 72))
        assert set(mask.get_flattened_data() if hasattr(mask, "get_flattened_data") else mask.getdata()) <= {0, 1, 2, 3}
    assert Image.open(folder / "masks_raw" / "picture_0_overlay.jpg").size == (96, 72)
    assert several["inference"].endswith("scales 0.75, 1, mirrored too")
    whole, _ = evaluated(directory, logs, "+data.eval_mode=whole")
    assert whole["inference"] == "whole images, shorter side 64, single scale"
    assert 0 < whole["aAcc"] <= 100


def test_two_processes__train_and_resume(root, tmp_path):
    options = ("trainer=ddp_cpu_2", "trainer.sync_batchnorm=false", f"data.root={root}", "data.batches_per_epoch=2")
    for result in run_ranks("train.py", *masked.SMALL, *options, "epochs=1", logs=tmp_path):
        assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    for result in run_ranks("train.py", f"resume={directory}", "epochs=2", logs=tmp_path):
        assert result.returncode == 0, result.stderr
    assert [row["step"] for row in metrics(directory)] == [1, 3]


def test_fsdp__validates_images_of_different_sizes(root, tmp_path):
    """Processes that share the weights must call the network equally often, whatever their images' sizes."""
    other = masked.write_folder(tmp_path / "long", (("train", 4), ("val", 1)), width=300)
    for kind in ("images", "masks"):
        Image.open(root / kind / "val" / "picture_1.png").save(other / kind / "val" / "short.png")
    options = [option for option in masked.SMALL if option != "trainer=cpu"]
    more = (
        "trainer=fsdp_cpu_2",
        "epochs=1",
        "data.eval_stride=8",
        f"data.root={other}",
        "trainer.sync_batchnorm=false",
    )
    for result in run_ranks("train.py", *options, *more, logs=tmp_path):
        assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    # Not equal to an evaluation: BatchNorm statistics are those of each process, as SyncBatchNorm needs GPUs.
    assert 0 <= metrics(directory)[-1]["val/mIoU"] <= 100
    assert len(list(directory.glob("checkpoints/best.ckpt.shards-*/*.safetensors"))) == 2


def test_bad_masks__are_one_sentence_before_the_training(root, tmp_path):
    other = masked.write_folder(tmp_path / "other", (("train", 2), ("val", 1)))
    Image.new("RGB", (96, 72)).save(other / "masks" / "val" / "picture_0.png")
    assert "picture_0.png: stores colours, not classes" in error_of(
        run("train.py", *masked.SMALL, f"data.root={other}", logs=tmp_path)
    )
    assert "which is no class" in error_of(
        run("train.py", *masked.SMALL, f"data.root={root}", "data.source.shift=0", logs=tmp_path)
    )


def test_bad_mask_of_one_process__is_the_sentence_of_both(tmp_path):
    root = masked.write_folder(tmp_path / "data", (("train", 4), ("val", 2)))
    Image.new("L", (96, 72), 9).save(root / "masks" / "train" / "picture_1.png")
    for result in run_ranks(
        "train.py", *masked.SMALL, "trainer=ddp_cpu_2", f"data.root={root}", logs=tmp_path, timeout=120
    ):
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith("error")
        assert "picture_1.png: has the value 9, which is no class" in result.stderr.splitlines()[-1]


def test_doctor__prints_the_findings(root, tmp_path):
    options = ("data=segmentation_folder", f"data.root={root}")
    result = run("doctor.py", *options, "data.source.shift=-1", logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No problems found" in result.stdout
    assert (tmp_path / "doctor" / "overlays.png").is_file()
    assert run("doctor.py", *options, logs=tmp_path).returncode == 1


@pytest.mark.parametrize("to", ["safetensors", "hub", "timm", "onnx", "torch_export"])
@pytest.mark.sample(1)
def test_export__gives_the_same_logits(to, finished):
    """The export is compared with the network, and its folder can be evaluated."""
    directory, logs = finished
    result = run("export.py", f"ckpt={directory}", f"to={to}", logs=logs)
    assert result.returncode == 0, result.stderr
    folder = directory / "export" / to
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "mIoU on its validation images" in card
    if to == "safetensors":
        expected, _ = evaluated(directory, logs, "weights=raw")
        options = ("data=segmentation_folder", "data.source.shift=-1", "data.short_side=64", "data.long_side=256")
        found, _ = evaluated(folder, logs, *options, f"data.root={OmegaConf.load(directory / 'config.yaml').data.root}")
        assert found["mIoU"] == pytest.approx(expected["mIoU"], abs=1e-3)


def test_official_checkpoint__is_evaluated_without_a_run(finished, root, tmp_path):
    """A file with the names of LV-ViT's segmentation checkpoints, whose backbone contains the pyramid."""
    directory, logs = finished
    saved = torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    weights = {re.sub(r"^neck\.", "backbone.", key[6:]): saved[key] for key in saved if key.startswith("model.")}
    torch.save({"meta": {}, "state_dict": weights}, tmp_path / "official.pth")
    options = ("model=upernet", "backbone=lvvit_nano", "model.channels=16", "model.auxiliary_channels=16")
    options += ("data=segmentation_folder", f"data.root={root}", "data.source.shift=-1", "data.image_size=64")
    found, _ = evaluated(tmp_path / "official.pth", logs, *options, "data.short_side=64", "data.long_side=256")
    expected, _ = evaluated(directory, logs)
    assert found["mIoU"] == pytest.approx(expected["mIoU"], abs=1e-3)
    result = predicted(tmp_path / "official.pth", root / "images" / "val", tmp_path, *options[:4], "image_size=64")
    assert "window 64 x 64, stride 42 x 42, shorter side 64, single scale" in result.stdout
    assert (tmp_path / "masks" / "picture_2.png").is_file()
