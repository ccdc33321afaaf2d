"""Problems in data and label maps that the function behind src/doctor.py finds."""

import shutil

import numpy as np
import pytest
from PIL import Image

from annotating import annotate, examine
from vitrail.data.label_maps import LabelMapStore


def test_doctor__no_problems(imagenet_tree, tmp_path, terminal):
    annotate(imagenet_tree, tmp_path / "maps", "top_k=2")
    assert examine(imagenet_tree, tmp_path / "maps")
    printed = terminal.getvalue()
    assert "No problems found" in printed
    for text in (
        "16 train images, 6 val images of 2 classes",
        "every image has a map and every map an image",
        "2 classes with the same names in the same order",
        "3 x 3 cells, top 2, covering the whole image",
        "match in all parts (1)",
    ):
        assert text in printed


def write_maps(path, keys, class_of, num_classes=2, value=8.0, **about):
    writer = LabelMapStore.create(path, len(keys), 1, (4, 4), num_classes, keys, **about)
    for index, key in enumerate(keys):
        writer.write(index, np.full((1, 4, 4), value), np.full((1, 4, 4), class_of(key)))
    return writer.finish()


def keys_of(tree):
    return sorted(str(path.relative_to(tree / "train").with_suffix("")) for path in tree.glob("train/*/*"))


def true_class(key):
    return int(key.startswith("pagoda"))


def damage(path):
    with (path / "maps.bin").open("r+b") as file:
        file.write(b"\x00\x7e")  # the first score becomes NaN


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path, keys: write_maps(path, keys, lambda key: 1 - true_class(key)), "0.0% of 16 maps agree"),
        (lambda path, keys: write_maps(path, keys, lambda _: 0), "pagoda is mostly labelled flower"),
        (
            lambda path, keys: write_maps(path, keys[1:], true_class),
            "1 of 16 images have no map, the first is flower/",
        ),
        (lambda path, _: write_maps(path, ["x/1"], true_class), "contains no map of any image; its keys look like x/1"),
        (lambda path, keys: write_maps(path, keys, true_class, 3), "the maps have 3 classes, the data has 2"),
        (
            lambda path, keys: write_maps(path, keys, true_class, class_names=["flower", "tower"]),
            "1 of 2 classes differ, the first is class 1: tower in the maps, pagoda in the data",
        ),
        (lambda path, keys: damage(write_maps(path, keys, true_class).path), "contains scores that are not finite"),
        (
            lambda path, keys: damage(write_maps(path, keys, true_class).path),
            "damaged within records 0 to 15",
        ),
        (lambda path, keys: (write_maps(path, keys, true_class).path / "keys.npy").unlink(), "damaged"),
    ],
)
def test_doctor__finds_errors_in_label_maps(make, text, image_tree, tmp_path, terminal):
    make(tmp_path / "maps", keys_of(image_tree))
    assert not examine(image_tree, tmp_path / "maps")
    assert text in terminal.getvalue()
    assert " found" in terminal.getvalue()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path, keys: write_maps(path, [*keys, "x/1"], true_class), "1 of 17 maps have no image"),
        (
            lambda path, keys: write_maps(path, keys, true_class, coverage="center square"),
            "covering only the central square, as published; 100% of the images are not square",
        ),
    ],
)
def test_doctor__warns_about_label_maps(make, text, image_tree, tmp_path, terminal):
    make(tmp_path / "maps", keys_of(image_tree))
    assert examine(image_tree, tmp_path / "maps")
    assert text in terminal.getvalue()


def test_doctor__finds_broken_images_and_missing_folders(image_tree, tmp_path, terminal):
    broken = image_tree / "val" / "flower" / "flower_0.jpg"
    broken.write_bytes(b"no picture")
    assert not examine(image_tree, "null")
    assert "1 of 6 sampled images cannot be used" in terminal.getvalue()
    assert not examine(tmp_path / "nowhere", "null")
    assert "nowhere: no such folder" in terminal.getvalue()


def set_count(image_tree, name, split, count):
    """Replace the images of class `name` in `split` by `count` copies of its first one."""
    folder = image_tree / split / name
    content = (folder / f"{name}_0.jpg").read_bytes()
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(count):
        (folder / f"{split}_{number}.jpg").write_bytes(content)


@pytest.mark.parametrize(("most", "is_warned"), [(40, False), (41, True)])
def test_doctor__warns_if_a_class_has_20_times_fewer_images(most, is_warned, image_tree, terminal):
    set_count(image_tree, "flower", "train", 2)
    set_count(image_tree, "pagoda", "train", most)
    assert examine(image_tree, "null", "sample=4")
    (row,) = [line for line in terminal.getvalue().splitlines() if "balance" in line]
    assert f"2 images of flower to {most} of pagoda" in row
    assert ("accuracy" in row) == is_warned


def test_doctor__warns_about_names_in_both_splits(image_tree, terminal):
    """flower_0 to flower_2 and pagoda_0 to pagoda_2 are in both; without them there is no warning."""
    assert examine(image_tree, "null", "sample=4")
    assert "6 images have the same name in train and val, the first is flower/flower_0" in terminal.getvalue()
    for name in ("flower", "pagoda"):
        set_count(image_tree, name, "val", 2)
    terminal.truncate(0)
    assert examine(image_tree, "null", "sample=4")
    assert "images have the same name" not in terminal.getvalue()
    assert "overlap" in terminal.getvalue()


def test_doctor__sizes_of_the_sampled_images(image_tree, terminal):
    """All images are 300 x 260 pixels, except for one of each class in val."""
    Image.new("RGB", (90, 400)).save(image_tree / "val" / "flower" / "flower_0.jpg")
    Image.new("RGB", (500, 280)).save(image_tree / "val" / "pagoda" / "pagoda_2.jpg")
    assert examine(image_tree, "null", "sample=6")
    (row,) = [line for line in terminal.getvalue().splitlines() if "val images" in line and "decoded" in line]
    assert "6 decoded; shorter sides 90 to 280 pixels, median 260" in row
    (row,) = [line for line in terminal.getvalue().splitlines() if "train images" in line and "decoded" in line]
    assert "6 decoded" in row


def test_doctor__reports_ignored_files_flat_images_and_the_value_range(image_tree, tmp_path, terminal):
    grey = np.asarray(Image.open(next(image_tree.glob("train/flower/*"))).convert("L"), np.uint16)
    Image.fromarray(grey * 16).save(image_tree / "train" / "flower" / "deep.png")
    Image.new("RGB", (60, 60), "red").save(image_tree / "train" / "pagoda" / "red.png")
    (image_tree / "train" / "flower" / "photo.heic").touch()
    (image_tree / "train" / "flower" / ".ipynb_checkpoints").mkdir()
    (image_tree / "train" / "loose.jpg").touch()
    examine(image_tree, "null")
    printed = " ".join(terminal.getvalue().split())
    for text in (
        "images with more than 8 bits per channel",
        "4095 is white",
        "1 .heic",
        "1 hidden",
        "1 image outside of the class",
    ):
        assert text in printed, printed
    assert "1 of 18 sampled images have one colour, or nearly so; the first is pagoda/red" in printed
