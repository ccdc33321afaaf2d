"""Pairs of images and masks, in the layouts of ADE20K, Cityscapes and PASCAL VOC."""

import os

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

import masked
from vitrail.data.segmentation import SegmentationFolder
from vitrail.data.segmentation.folders import read_classes
from vitrail.errors import ConfigError, ImageError
from vitrail.runs.config import instantiate
from vitrail_runtime.project import CONF

LINK = "link to a folder that is listed elsewhere"


def save(path, values, colours=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.array(values, np.uint8))
    if colours is not None:
        picture.putpalette(colours)
    picture.save(path)


def photograph(path, height=2, width=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "grey").save(path)


def preset(name, root, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", [f"data={name}", f"data.root={root}", *overrides]).data.source
    return instantiate(node, "data.source")


def test_ade20k__classes_start_at_one_and_zero_is_ignored(tmp_path):
    for split, short in (("training", "train"), ("validation", "val")):
        photograph(tmp_path / "images" / split / f"ADE_{short}_00000001.jpg")
        save(tmp_path / "annotations" / split / f"ADE_{short}_00000001.png", [[0, 1, 2], [150, 150, 0]])
    rows = [f"{number}\t0.1\t1\t1\t1\tname {number}, other" for number in range(1, 149)]
    rows += ["149\t.1\t1\t1\t1\tscreen, silver screen", "150\t.1\t1\t1\t1\tscreen, CRT screen"]
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(rows))
    source = preset("ade20k", tmp_path)
    assert source.classes[:2] == ["name 1", "name 2"]
    assert source.classes[148:] == ["screen, silver screen", "screen, CRT screen"]
    sample = source.open("train")[0]
    assert sample.mask.tolist() == [[255, 0, 1], [149, 149, 255]]
    assert source.open("val").keys() == ["ADE_val_00000001"]


def test_cityscapes__label_ids_become_train_ids(tmp_path):
    stem = "aachen_000000_000019"
    for split in ("train", "val"):
        photograph(tmp_path / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png")
        folder = tmp_path / "gtFine" / split / "aachen"
        save(folder / f"{stem}_gtFine_labelIds.png", [[0, 7, 8], [33, 29, 11]])
        save(folder / f"{stem}_gtFine_instanceIds.png", [[0, 0, 0], [0, 0, 0]])
    source = preset("cityscapes", tmp_path)
    assert len(source.classes) == 19
    split = source.open("train")
    assert split.keys() == [f"aachen/{stem}"]
    assert split[0].mask.tolist() == [[255, 0, 1], [18, 255, 2]]
    values = list(range(34))
    assert sum(value != 255 for value in source.table.classes(np.array([values]), "all")[0]) == 19
    assert source.table.classes(np.array([[255]]), "licence plate").tolist() == [[255]]


def test_voc__palettes_lists_and_borders(tmp_path):
    for name in ("2007_000001", "2007_000002", "2007_000003"):
        photograph(tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in ("2007_000001", "2007_000002"):
        save(tmp_path / "SegmentationClass" / f"{name}.png", [[0, 20, 255], [1, 1, 1]], [9] * 768)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000002\r\n")
    (lists / "val.txt").write_text("2007_000001\n")
    source = preset("voc2012", tmp_path)
    assert source.open("train").keys() == ["2007_000002"]
    assert source.open("val")[0].mask.tolist() == [[0, 20, 255], [1, 1, 1]]
    (lists / "train.txt").write_text("2007_000003\n")
    with pytest.raises(ConfigError, match=r"data\.source\.train_masks: 1 of 1 images have no mask.*2007_000003"):
        source.open("train")
    (lists / "train.txt").write_text("2007_000009\n")
    with pytest.raises(ConfigError, match=r"train_list.*: 1 of its images are missing, the first is 2007_000009"):
        source.open("train")


@pytest.fixture
def root(tmp_path):
    return masked.write_folder(tmp_path / "data", (("train", 3), ("val", 1)))


def folder(root, **options):
    return SegmentationFolder(root and str(root), **{"classes": "classes.txt", "shift": -1, **options})


def test_unpaired__stop_or_skip(root, caplog):
    (root / "masks" / "train" / "picture_1.png").unlink()
    with pytest.raises(ConfigError, match=r"train_masks: 1 of 3 images have no mask, the first is picture_1.*skip"):
        folder(root).open("train")
    assert folder(root, on_unpaired="skip").open("train").keys() == ["picture_0", "picture_2"]
    assert "skipped 1 images without mask" in caplog.text
    (root / "images" / "train" / "picture_2.png").unlink()
    assert folder(root).masks_alone("train") == ["picture_2"]


def test_sizes__must_agree(root):
    Image.new("L", (50, 40), 1).save(root / "masks" / "train" / "picture_0.png")
    with pytest.raises(ImageError, match=r"picture_0\.png: is 40 x 50 pixels, its image picture_0.png 72 x 96"):
        folder(root).open("train")[0]


def test_files__follow_the_rule_of_class_folders(root, caplog):
    """Hidden files, thumbnails, links upwards and pipes are no images, and are counted."""
    caplog.set_level("INFO")
    images = root / "images" / "train"
    for name in (".hidden.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png", "notes.txt"):
        photograph(images / name) if name.endswith("png") else (images / name).write_text("")
    (images / "up").symlink_to("..")
    os.mkfifo(images / "pipe.png")
    split = folder(root).open("train")
    assert split.keys() == ["picture_0", "picture_1", "picture_2"]
    assert split.ignored == {"hidden": 2, "@eaDir/": 1, ".txt": 1, "special file": 1, LINK: 1}
    assert "images/train: ignored 2 hidden" in caplog.text


def test_names__in_two_unicode_forms_and_other_encodings_belong_together(root):
    for kind, accented in (("images", "cafe\u0301.png"), ("masks", "caf\u00e9.png")):
        files = root / kind / "train"
        (files / "picture_0.png").rename(files / accented)
        (files / "picture_1.png").rename(files / os.fsdecode(b"stra\xdfe.png"))
    assert folder(root).open("train").keys() == ["caf\u00e9", "picture_2", "stra\\xdfe"]
    photograph(root / "images" / "train" / "caf\u00e9.png")
    with pytest.raises(ConfigError, match=r"train_images: .* have the same name; remove one of them"):
        folder(root).open("train")


def test_value_range__is_found_once_or_given(root, caplog):
    caplog.set_level("INFO")
    for number in range(3):
        values = np.full((72, 96), 4095 if number == 1 else 100, np.uint16)
        Image.fromarray(values).save(root / "images" / "train" / f"picture_{number}.png")
    source = folder(root)
    assert np.asarray(source.open("val")[0].image).shape == (72, 96, 3)
    assert source.value_range == (0.0, 4095.0)
    assert "data.value_range=[0, 4095], found in 3 of 3 images" in caplog.text
    assert np.unique(np.asarray(source.open("train")[0].image)).tolist() == [6]
    with pytest.raises(
        ImageError, match=r"picture_1\.png: has the value 4095, outside of data.value_range=\[0, 1023\]"
    ):
        folder(root, value_range=[0, 1023]).open("train")[1]


def test_exif_rotation__of_the_image_alone_is_noticed(root):
    path = root / "images" / "train" / "picture_0.png"
    picture = Image.open(path)
    exif = Image.Exif()
    exif[274] = 6
    path.unlink()
    picture.save(path.with_suffix(".jpg"), exif=exif)
    with pytest.raises(ImageError, match=r"72 x 96 pixels, its image picture_0.jpg 96 x 72 \(upright, by its EXIF"):
        folder(root).open("train")[0]


def test_unlabelled_image__is_refused(root):
    Image.new("L", (96, 72), 0).save(root / "masks" / "train" / "picture_0.png")
    with pytest.raises(ImageError, match=r"picture_0.png: no pixel is labelled.*data.on_corrupt=skip"):
        folder(root).open("train")[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"root": None}, "data.root: not set"),
    ({"root": "/nowhere"}, "data.root=/nowhere: no such folder"),
    ({"classes": "names.txt"}, "data.source.classes=.*names.txt: cannot be read"),
    ({"train_masks": "labels"}, "data.source.train_masks: no such folder"),
    ({"mask_suffix": "_mask", "on_unpaired": "skip"}, "no image in .* has a mask in .*check the folders"),
])  # fmt: skip
def test_wrong_paths__name_their_key(options, message, root):
    with pytest.raises(ConfigError, match=message):
        folder(options.pop("root", root), **options).open("train")


def test_class_files__are_checked(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text("Idx,Ratio,Train,Val,Stuff,Name\n1,.1,1,1,1,wall\n2,.1,1,1,1,bed ;couch\n")
    assert read_classes(path) == ["wall", "bed"]
    path.write_text("a\nb\na\n")
    with pytest.raises(ConfigError, match="the name a occurs twice"):
        read_classes(path)
    path.write_text("caf\u00e9\ncafe\u0301\n", encoding="utf-8-sig")
    with pytest.raises(ConfigError, match="the name caf\u00e9 occurs twice"):
        read_classes(path)
    path.write_bytes(b"stra\xdfe\n")
    with pytest.raises(ConfigError, match=r"names\.csv: is not UTF-8 text"):
        read_classes(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="contains no names"):
        read_classes(path)
