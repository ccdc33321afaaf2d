"""Image folders as sources: one value range for all splits, which is recorded and used again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from programs import QUICK, run, run_directories, train
from vitrail.data import ImageFolderDataModule
from vitrail.data.sources import ImageFolder
from vitrail.errors import ConfigError, ImageError


@pytest.fixture
def scans(tmp_path):
    """Two classes of 12-bit images in 16 bits; those of the validation split are so dark that they fit in 10 bits."""
    rng = np.random.default_rng(0)
    for split, largest in (("train", 4000), ("val", 1000)):
        for name in ("a", "b"):
            folder = tmp_path / "scans" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, largest, (32, 32), np.uint16)).save(folder / f"{number}.png")
    return tmp_path / "scans"


def test_value_range__is_that_of_the_training_images(scans, caplog):
    source = ImageFolder(str(scans))
    with caplog.at_level("INFO", logger="vitrail"):
        dark = source.open("val")[0]
    assert source.value_range == (0, 4095)
    assert "data.value_range=[0, 4095], found in 8 of 8 images" in caplog.text
    assert np.asarray(dark.image).max() <= round(1000 / 4095 * 255)


def test_value_range__of_the_user_and_outside_of_it(scans):
    source = ImageFolder(str(scans), value_range=(0, 1023))
    assert np.asarray(source.open("val")[0].image).max() > 200
    with pytest.raises(ImageError, match=r"0.png: has the value \d+, outside of data.value_range=\[0, 1023\]"):
        source.open("train")[0]
    with pytest.raises(ConfigError, match="value_range"):
        ImageFolder(str(scans), value_range=(5, 5))


def test_value_range__of_a_type_if_the_sample_has_none(image_tree, monkeypatch):
    """A rare 16-bit image among 8-bit ones is not scaled by its own maximum."""
    grey = np.asarray(Image.open(next(image_tree.glob("train/flower/*"))).convert("L"), np.uint16)
    Image.fromarray(grey * 16).save(image_tree / "train" / "flower" / "flower_00.png")
    monkeypatch.setattr("vitrail.data.sources.folders.SAMPLE", 1)
    source = ImageFolder(str(image_tree))
    split = source.open("train")
    assert source.value_range is None
    image = np.asarray(split[split.keys().index("flower/flower_00")].image)
    assert np.abs(image[..., 0] - grey * 16 / 257).max() <= 1


def test_value_range__is_recorded_and_used_in_evaluation(scans, tmp_path):
    options = (
        "data=imagefolder",
        f"data.root={scans}",
        "data.image_size=32",
        "data.batch_size=4",
        "data.num_workers=0",
    )
    directory = train(*QUICK, *options, "model=vit_nano", logs=tmp_path)
    assert vitrail.load_run(directory).input.value_range == (0.0, 4095.0)
    assert run("export.py", f"ckpt={directory}", "to=hub", logs=tmp_path).returncode == 0
    assert vitrail.load_run(directory / "export" / "hub").input.value_range == (0.0, 4095.0)
    again = ["data=imagefolder", f"data.root={scans}", "data.num_workers=0"]
    for arguments in ([f"ckpt={directory}"], [f"ckpt={directory}/export/hub", *again]):
        done = run("eval.py", *arguments, logs=tmp_path)
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((path / "results.json").read_text()) for path in run_directories(tmp_path, "eval"))
    assert first["ema"]["loss"] == pytest.approx(second["raw"]["loss"], abs=1e-6)


def test_datamodule__passes_the_value_range_on(scans):
    data = ImageFolderDataModule(str(scans), image_size=32, batch_size=4, num_workers=0, value_range=[0, 8190])
    data.setup()
    assert data.input.value_range == (0, 8190)
    images = torch.cat([batch.image for batch in data.val_dataloader()])
    assert images.max() < (0.2 - 0.406) / 0.225 + 0.5
