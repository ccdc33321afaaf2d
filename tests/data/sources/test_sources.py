import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vitrail.data.images import size_of
from vitrail.data.sources import Digits, ImageFolder, TorchvisionDataset
from vitrail.errors import ConfigError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_digits__equal_scikit_learn():
    reference = load_digits()
    splits = {name: Digits().open(name) for name in ("train", "val")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 1438, "val": 359}
    held_out = np.arange(1797) % 5 == 4
    np.testing.assert_array_equal(splits["val"].labels, reference.target[held_out])
    np.testing.assert_array_equal(splits["train"].labels, reference.target[~held_out])
    sample = splits["val"][7]
    pixels = np.asarray(sample.image)
    assert pixels.shape == (8, 8, 3)
    np.testing.assert_allclose(pixels[..., 0] / 255 * 16, reference.images[held_out][7], atol=0.04)
    assert sample.key == "digits/val/000007"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist__from_debians_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in DEBIAN.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    source = TorchvisionDataset("FashionMNIST", str(tmp_path), download=False, classes=[str(n) for n in range(10)])
    source.prepare()
    assert (len(source.open("train")), len(source.open("val"))) == (60_000, 10_000)
    assert np.bincount(source.open("val").labels).tolist() == [1000] * 10
    assert size_of(source.open("val")[0].image) == (28, 28)
    assert source.open("val")[0].label == 9  # an ankle boot


def test_torchvision__missing_files_or_unknown_name(tmp_path):
    for name, message in (
        ("CIFAR10", "CIFAR10 is missing and data.source.download=false"),
        ("CIFAR11", "data.source.name=CIFAR11: torchvision has no"),
    ):
        with pytest.raises(ConfigError, match=message):
            TorchvisionDataset(name, str(tmp_path), download=False, classes=[]).prepare()


def test_image_folder__sorted_with_keys(image_tree):
    (image_tree / "train" / "flower" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(image_tree / "train" / "flower" / "deeper" / "x.y.png")
    (image_tree / "train" / "flower" / "notes.txt").write_text("no image")
    (image_tree / "train" / ".cache").mkdir()
    source = ImageFolder(str(image_tree))
    assert source.classes == ["flower", "pagoda"]
    split = source.open("train")
    assert len(split) == 17
    assert split[0].key == "flower/deeper/x.y"
    assert split[1].key == "flower/flower_0"
    assert size_of(split[1].image) == (260, 300)
    assert (split[0].label, split[16].label) == (0, 1)


def test_image_folder__invalid_folders(image_tree):
    with pytest.raises(ConfigError, match=r"data.root: not set"):
        ImageFolder(None)
    with pytest.raises(ConfigError, match=r"contains no folder test/"):
        ImageFolder(str(image_tree), val_dir="test")
    for file in (image_tree / "val" / "pagoda").iterdir():
        file.rename(image_tree / "val" / file.name)
    with pytest.raises(ConfigError, match=r"class folder .*val/pagoda contains no image"):
        ImageFolder(str(image_tree)).open("val")
    (image_tree / "val" / "pagoda").rmdir()
    with pytest.raises(ConfigError, match=r"different classes: 1 only in train/ \(pagoda\)\. Make them the same\.$"):
        ImageFolder(str(image_tree))
    for file in (image_tree / "val" / "flower").iterdir():
        file.unlink()
    (image_tree / "val" / "flower").rmdir()
    with pytest.raises(ConfigError, match=r"val contains images but no class folders\. Put the images into"):
        ImageFolder(str(image_tree))
