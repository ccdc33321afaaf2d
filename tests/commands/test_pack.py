"""The functions behind pack.py, doctor.py and plan=true on packs, and on sources other than folders."""

import importlib.util
import os

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

import layouts
from annotating import annotate
from packing import pack
from programs import PROJECT
from vitrail.commands import doctor as doctor_command
from vitrail.commands.plan import make_plan
from vitrail.data.label_maps import LabelMapJoin, LabelMapStore
from vitrail.data.sources import ImageFolder
from vitrail.errors import ConfigError

pytestmark = pytest.mark.thorough


def composed(program, *overrides):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose(program, [*overrides, "paths.run=/tmp/run"])


def examine(path, *overrides):
    return doctor_command.examine(composed("doctor", "data=packed", f"data.root={path}", *overrides))


def test_pack__summary_and_second_call(image_tree, tmp_path, terminal):
    made = pack(tmp_path / "pack", f"data.root={image_tree}", "size=100", "quality=80", "shard_images=10")
    state = (tmp_path / "pack" / "manifest.json").stat()
    printed = terminal.getvalue()
    for text in ("16 images, ", " in 2 files, ", "6 images, ", "KiB per image", "JPEGs of quality 80"):
        assert text in printed
    assert f"train.py data=packed data.root={tmp_path / 'pack'}" in printed
    again = pack(tmp_path / "pack", f"data.root={image_tree}", "size=100", "quality=80")  # already finished
    assert again.manifest == made.manifest
    assert (tmp_path / "pack" / "manifest.json").stat() == state


def test_pack__skips_and_verifies_as_asked(image_tree, tmp_path, terminal):
    (image_tree / "train" / "flower" / "flower_3.jpg").write_bytes(b"no picture")
    pack(tmp_path / "copied", f"data.root={image_tree}", "verify=false")
    pack(tmp_path / "pack", f"data.root={image_tree}", "data.on_corrupt=skip")
    assert "1 unreadable image, listed in " in terminal.getvalue()
    assert "flower_3.jpg: not a readable image" in (tmp_path / "pack" / "skipped.txt").read_text()
    assert not examine(tmp_path / "copied")
    assert examine(tmp_path / "pack")


def test_pack__settings_without_effect_and_invalid_ones(image_tree, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        pack(tmp_path / "pack", f"data.root={image_tree}", "quality=80")
    assert "quality=80 has no effect" in caplog.text
    for option, message in (
        ("size=0", "size=0: must be original or an integer of at least 1"),
        ("quality=101", "quality=101: must be an integer of at least 1 and at most 100"),
        ("format=png", "format=png: choose jpeg, raw"),
        ("processes=0", "processes=0: must be an integer of at least 1 or null"),
        ("+sise=3", "sise: no such config key"),
    ):
        with pytest.raises(ConfigError, match=message):
            pack(tmp_path / "other", f"data.root={image_tree}", option)


def test_pack__of_torchvisions_set(tmp_path):
    import pickle

    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    from torchvision import datasets

    with pytest.MonkeyPatch.context() as patch:  # the published files have checksums
        patch.setattr(datasets.CIFAR10, "_check_integrity", lambda *_: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        made = pack(
            tmp_path / "pack", "data=cifar10", f"data.source.root={tmp_path / 'data'}", "data.source.download=false"
        )
    split = made.open("train")
    assert len(split) == 50
    image = np.asarray(split[12].image)
    np.testing.assert_array_equal(image, pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["imagenet_archives", "imagenet_kaggle", "webdataset", "parquet"])
def test_pack__of_imagenets_releases(name, tmp_path):
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("needs pyarrow")
    root = getattr(layouts, f"write_{name.removeprefix('imagenet_')}")(tmp_path / "data")
    classes = ("data.source.classes=imagenet-1k",) if name in ("webdataset", "parquet") else ()
    made = pack(tmp_path / "pack", f"data={name}", f"data.root={root}", *classes)
    assert made.splits == ("train", "val")
    for split, images in (("train", layouts.train_images()), ("val", layouts.val_images())):
        found = made.open(split)
        expected = {
            f"{layouts.WNIDS[label]}/{image}": (label, layouts.content(image, label)) for image, label in images
        }
        keys = list(found.keys())
        assert {key: (found.labels[i], found.encoded(i).data) for i, key in enumerate(keys)} == expected


def test_pack__of_an_archive_with_a_damaged_image(tmp_path):
    root = layouts.write_archives(tmp_path / "data")
    val = root / "ILSVRC2012_img_val.tar"
    broken = layouts.content(*layouts.val_images()[6])
    val.write_bytes(val.read_bytes().replace(broken, b"x" * len(broken)))
    options = ("data=imagenet_archives", f"data.root={root}", "data.source.train=null")
    with pytest.raises(ValueError, match=r"img_val.tar: n\d{8}/ILSVRC2012_val_00000007: not a readable image"):
        pack(tmp_path / "pack", *options)
    made = pack(tmp_path / "pack", *options, "data.on_corrupt=skip")
    assert len(made.open("val")) == 999
    assert "ILSVRC2012_val_00000007" in (tmp_path / "pack" / "skipped.txt").read_text()


def test_doctor__checks_packs(image_tree, tmp_path, terminal):
    pack(tmp_path / "pack", f"data.root={image_tree}")
    assert examine(tmp_path / "pack")
    assert "all files are as they were written" in terminal.getvalue()
    path = tmp_path / "pack" / "val" / "00000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    assert examine(tmp_path / "pack", "checksums=false")
    assert not examine(tmp_path / "pack")
    assert "1 damaged file: " in terminal.getvalue()
    os.truncate(path, 10)
    assert not examine(tmp_path / "pack", "checksums=false")
    assert "val/00000.bin has 10 bytes instead of" in terminal.getvalue()


def test_doctor__pack_without_training_images(image_tree, tmp_path, terminal):
    made = pack(tmp_path / "pack", f"data.root={image_tree}", "data.source.train_dir=null")
    assert made.splits == ("val",)
    assert examine(tmp_path / "pack")
    assert "6 val images of 2 classes" in terminal.getvalue()


def test_plan__states_what_a_pack_stores(image_tree, tmp_path):
    for name, options in (("original", ()), ("small", ("size=64", "format=raw"))):
        pack(tmp_path / name, f"data.root={image_tree}", *options)
    stored = {
        name: make_plan(composed("train", "data=packed", f"data.root={tmp_path / name}", "data.image_size=32")).stored
        for name in ("original", "small")
    }
    assert stored == {"original": "", "small": "shorter sides above 64 pixels were resized to 64 (bicubic)"}


def test_label_maps__join_a_pack_by_key(image_tree, label_maps, tmp_path):
    made = pack(tmp_path / "pack", f"data.root={image_tree}")
    split, folder = made.open("train"), ImageFolder(str(image_tree)).open("train")
    store = LabelMapStore.open(label_maps)
    joins = [LabelMapJoin(store, keys, made.classes) for keys in (split.keys(), folder.keys())]
    np.testing.assert_array_equal(joins[0].records, joins[1].records)
    joins[0].check(split.labels)


@pytest.mark.thorough
def test_annotate__a_pack(imagenet_tree, tmp_path):
    pack(tmp_path / "pack", f"data.root={imagenet_tree}")
    one = annotate(tmp_path / "pack", tmp_path / "maps", "data=packed", "top_k=2")
    two = annotate(imagenet_tree, tmp_path / "same", "top_k=2")
    assert list(one.keys) == list(two.keys)
    assert all(np.array_equal(one[index][0], two[index][0]) for index in range(len(one)))
