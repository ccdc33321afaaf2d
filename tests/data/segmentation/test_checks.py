"""What the doctor says about images with masks."""

import pytest
from PIL import Image

import masked
from vitrail.commands.doctor import _findings
from vitrail.runs import compose


@pytest.fixture
def root(tmp_path):
    return masked.write_folder(tmp_path / "data", (("train", 4), ("val", 2)))


def findings(root, *overrides):
    options = ("data=segmentation_folder", f"data.root={root}", "data.source.shift=-1", f"paths.logs={root}/logs")
    return {finding.check: finding for finding in _findings(compose("doctor", [*options, *overrides]))}


def test_doctor__no_problems(root):
    found = findings(root)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["folders"].text == "4 train images, 2 val images of 4 classes"
    assert "5.6 % of the pixels are not labelled; of the others ground" in found["train classes"].text
    assert Image.open(root / "logs" / "doctor" / "overlays.png").size[0] > 500


def test_doctor__forgotten_shift(root):
    found = findings(root, "data.source.shift=0")
    assert found["train images"].level == "error"
    assert "has the value 4, which is no class" in found["train images"].text


def test_doctor__sizes_pairs_and_orientation(root):
    Image.new("L", (20, 10), 1).save(root / "masks" / "train" / "picture_0.png")
    Image.new("L", (20, 10), 1).save(root / "masks" / "train" / "picture_9.png")
    path = root / "images" / "train" / "picture_1.png"
    exif = Image.Exif()
    exif[274] = 3
    Image.open(path).save(path, exif=exif)
    found = findings(root)
    assert "1 of 4 sampled images cannot be used" in found["train images"].text
    assert found["train pairs"].text == "1 masks have no image, the first is picture_9"
    assert "1 images are turned by their EXIF orientation" in found["train orientation"].text
    (root / "masks" / "train" / "picture_2.png").unlink()
    assert "1 of 4 images have no mask" in findings(root)["folders"].text
    assert "skipped" not in findings(root, "data.source.on_unpaired=skip")["train pairs"].text


def test_doctor__classes_that_never_occur(root):
    (root / "classes.txt").write_text("ground\nred\ngreen\nblue\nviolet\n")
    found = findings(root)
    assert found["train classes"].level == "warning"
    assert "1 classes have less than 0.01 %: violet" in found["train classes"].text
