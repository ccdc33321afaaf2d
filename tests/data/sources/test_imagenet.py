import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from vitrail.data.sources.imagenet import ImageNet, ImageNetReal, ImageNetVariant, synsets
from vitrail.errors import ConfigError

pytestmark = pytest.mark.thorough

INFO = Path(timm.data.__path__[0], "_info")


def write(folder, names, file="a.png"):
    image = folder.parent / "image.png"
    folder.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(image)
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / file).hardlink_to(image)


def test_synsets__subsets_match_timms_indices():
    everything = synsets("imagenet-1k")
    for name in ("a", "r"):
        indices = map(int, (INFO / f"imagenet_{name}_indices.txt").read_text().split())
        assert synsets(f"imagenet-{name}") == [everything[index] for index in indices]


def test_imagenet__requires_the_1000_synsets(tmp_path):
    for split in ("train", "val"):
        for name in synsets("imagenet-1k"):
            (tmp_path / split / name).mkdir(parents=True)
    source = ImageNet(str(tmp_path))
    assert len(source.classes) == 1000
    assert (source.classes[0], source.classes[-1]) == ("n01440764", "n15075141")
    for split in ("train", "val"):
        (tmp_path / split / "n01440764").rename(tmp_path / split / "n99999999")
    with pytest.raises(ConfigError, match=r"1 missing, first n01440764; 1 unknown, first n99999999"):
        ImageNet(str(tmp_path))


def test_variant__folders_named_by_index_are_sorted_as_numbers(tmp_path, caplog):
    write(tmp_path / "v2", [str(index) for index in range(1000)])
    source = ImageNetVariant(str(tmp_path / "v2"), images=10_000)
    with caplog.at_level(logging.WARNING):
        split = source.open("val")
    assert "1000 images; the published set has 10000" in caplog.text
    assert source.classes == synsets("imagenet-1k")
    by_key = dict(zip(split.keys(), split.labels.tolist(), strict=True))
    assert (by_key["2/a"], by_key["10/a"], by_key["999/a"]) == (2, 10, 999)
    assert split[10].label == 10
    with pytest.raises(ConfigError, match=r"for evaluation only; use src/eval\.py"):
        source.open("train")


def test_variant__folders_named_by_synset(tmp_path):
    names = synsets("imagenet-r")
    write(tmp_path / "r", names)
    split = ImageNetVariant(str(tmp_path / "r"), "imagenet-r", images=200).open("val")
    assert split.labels.tolist() == list(range(200))
    with pytest.raises(ConfigError, match="200 class folders are not the 200 of imagenet-a"):
        ImageNetVariant(str(tmp_path / "r"), "imagenet-a")
    with pytest.raises(
        ConfigError, match=r"data.source.classes=imagenet-b: choose imagenet-1k, imagenet-a or imagenet-r\."
    ):
        ImageNetVariant(str(tmp_path / "r"), "imagenet-b")


def test_real__labels_by_file_name(tmp_path):
    names = synsets("imagenet-1k")
    write(tmp_path / "images" / "val", names[:-2], "ILSVRC2012_val_00000002.JPEG")
    write(tmp_path / "images" / "val", names[-2:-1], "ILSVRC2012_val_00050000_n13133613.JPEG")
    write(tmp_path / "images" / "val", names[-1:], "ILSVRC2012_val_00000001.JPEG")
    split = ImageNetReal(str(tmp_path / "images")).open("val")
    reassessed = json.loads((INFO / "imagenet_real_labels.json").read_text())
    assert split.label_sets[0] == tuple(reassessed[1]) == (970, 795)
    assert split.label_sets[-2] == tuple(reassessed[-1])
    assert split.label_sets[-1] == ()
    np.testing.assert_array_equal(split.labels, np.arange(1000))
    (tmp_path / "images" / "val" / names[0] / "cat.png").hardlink_to(tmp_path / "images" / "image.png")
    with pytest.raises(ConfigError, match="n01440764/cat is not named like ImageNet's validation images"):
        ImageNetReal(str(tmp_path / "images")).open("val")
