"""Packs: what they store, how they resume, and what they refuse."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import layouts
from packing import pack
from vitrail.data.images import as_image, load_image, size_of
from vitrail.data.sources import Digits, ImageFolder, ImageNetReal, Packed
from vitrail.data.sources.packed import PackOptions, PackWriter
from vitrail.data.sources.tables import Table
from vitrail.errors import ConfigError, ImageError

pytestmark = pytest.mark.thorough


def written(out, source, *options, shard_images=5, **more):
    writer = PackWriter(out, source, PackOptions(*options), **more)
    writer.begin(shard_images)
    for shard in writer.shards():
        writer.write(shard)
    writer.finish()
    return Packed(str(out))


@pytest.fixture
def mixed(image_tree):
    """Images of many kinds: EXIF orientation, a palette with transparency, 16 bits, and a large one."""
    folder = image_tree / "train" / "flower"
    image = Image.open(folder / "flower_0.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("RGBA").quantize().save(folder / "palette.png")
    Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 16).save(folder / "scan.png")
    image.resize((900, 700)).save(folder / "large.jpg")
    return ImageFolder(str(image_tree))


def test_pack__of_original_files_gives_the_same_images(mixed, tmp_path):
    pack = written(tmp_path / "pack", mixed)
    assert (pack.classes, pack.splits, pack.value_range) == (["flower", "pagoda"], ("train", "val"), (0.0, 4095.0))
    assert pack.describe() == ""
    assert len(list((tmp_path / "pack" / "train").glob("*.bin"))) == 4
    for split in ("train", "val"):
        found, expected = pack.open(split), mixed.open(split)
        found = pickle.loads(pickle.dumps(found))  # as a loader worker gets it
        assert list(found.keys()) == expected.keys()
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert found.labels.dtype == np.int64
        for index in range(len(expected)):
            one, two = found[index], expected[index]
            assert (one.label, one.key) == (two.label, two.key)
            assert one.image.tobytes() == two.image.tobytes()
            assert found.encoded(index).data == expected.encoded(index).data
    assert list(pack.damaged()) == []


def test_pack__resizes_the_shorter_side_but_never_up(mixed, tmp_path):
    pack = written(tmp_path / "pack", mixed, 280, "jpeg", 80)
    assert "280 pixels were resized to 280 (bicubic), and resized images are JPEGs of quality 80" in pack.describe()
    split, original = pack.open("train"), mixed.open("train")
    place = {key: index for index, key in enumerate(split.keys())}
    assert size_of(split[place["flower/large"]].image) == (280, 360)
    expected = as_image(original[place["flower/large"]].image).resize((360, 280), Image.Resampling.BICUBIC)
    difference = np.asarray(split[place["flower/large"]].image, int) - np.asarray(expected, int)
    assert 0 < np.abs(difference).mean() < 4
    for key in ("flower/turned", "flower/palette", "pagoda/pagoda_0"):  # 300 x 260: their files are kept
        assert split.encoded(place[key]).data == original.encoded(place[key]).data
    small = written(tmp_path / "small", mixed, 100).open("train")
    assert small[place["flower/turned"]].image.shape[:2] == (115, 100)


def test_pack__of_pixels_needs_no_decoding(mixed, tmp_path):
    pack = written(tmp_path / "pack", mixed, None, "raw")
    split, original = pickle.loads(pickle.dumps(pack.open("train"))), mixed.open("train")
    for index in range(len(split)):
        pixels = split.pixels(index)
        np.testing.assert_array_equal(pixels, np.asarray(original[index].image))
        assert not pixels.flags.writeable
        assert split[index].image.tobytes() == original[index].image.tobytes()
    resized = written(tmp_path / "resized", mixed, 100, "raw")
    assert min(resized.open("train").pixels(0).shape[:2]) == 100
    assert resized.describe() == "shorter sides above 100 pixels were resized to 100 (bicubic)"
    assert not hasattr(split, "encoded")
    again = written(tmp_path / "again", resized)  # a pack of a pack
    np.testing.assert_array_equal(np.asarray(again.open("val")[0].image), resized.open("val").pixels(0))


def test_pack__of_arrays_is_without_loss(tmp_path):
    found, expected = written(tmp_path / "pack", Digits(), shard_images=None).open("val"), Digits().open("val")
    assert list(found.keys()) == expected.keys()
    assert found[9].image.tobytes() == expected[9].image.tobytes()


def test_pack__value_range(mixed, tmp_path):
    pack = written(tmp_path / "pack", mixed)
    index = list(pack.open("train").keys()).index("flower/scan")
    brighter = Packed(str(tmp_path / "pack"), [0, 8190]).open("train")[index].image
    expected = load_image(mixed.root / "train" / "flower" / "scan.png", (0, 8190))
    assert brighter.tobytes() == expected.tobytes()
    written(tmp_path / "raw", mixed, None, "raw")
    with pytest.raises(ConfigError, match=r"data.value_range=\[0.0, 8190.0\]: the pack .* made with \[0.0, 4095.0\]"):
        Packed(str(tmp_path / "raw"), [0, 8190])


@pytest.mark.thorough
def test_pack__real_labels(tmp_path):
    source = ImageNetReal(str(layouts.write_folders(tmp_path / "imagenet")))
    pack = written(tmp_path / "pack", source, shard_images=400)
    assert pack.splits == ("val",)
    found, expected = pack.open("val"), source.open("val")
    assert list(found.label_sets) == expected.label_sets
    assert found.label_sets[3:5] == expected.label_sets[3:5]
    assert () in expected.label_sets
    with pytest.raises(
        ConfigError, match=r"has no train split, only val; pack a data set that has one, or use src/eval"
    ):
        pack.open("train")


def test_pack__resumes_after_whole_data_files(image_tree, tmp_path):
    source, out = ImageFolder(str(image_tree)), tmp_path / "pack"
    writer = PackWriter(out, source, PackOptions())
    assert not writer.begin(5)
    first, second, *others = writer.shards()
    writer.write(first)
    (out / "train" / ".00001.bin.999").write_bytes(b"of a process that was killed")
    (out / "train" / "00001.bin").write_bytes(b"renamed, but without an index")
    with pytest.raises(ConfigError, match=r"pack: an unfinished pack; run the same pack.py command again to resume"):
        Packed(str(out))
    state = (out / "train" / "00000.bin").stat()

    writer = PackWriter(out, source, PackOptions())
    assert not writer.begin(None)
    assert [shard for shard in writer.shards() if not writer.is_done(shard)] == [second, *others]
    with pytest.raises(ConfigError, match=r"00001.npz: is missing; run the same command again"):
        writer.finish()
    for shard in (second, *others):
        writer.write(shard)
    writer.finish()
    assert (out / "train" / "00000.bin").stat() == state
    assert PackWriter(out, source, PackOptions()).begin(None)
    assert not list(out.rglob(".0*")) + list(out.rglob("*.npz")) + list(out.glob("begun.json"))
    whole = written(tmp_path / "whole", source)
    assert Packed(str(out)).manifest == whole.manifest


def test_pack__unreadable_images_stop_or_are_skipped(image_tree, tmp_path):
    (image_tree / "train" / "flower" / "flower_3.jpg").write_bytes(b"no picture")
    (image_tree / "val" / "flower" / "flower_0.jpg").write_bytes(b"")
    source = ImageFolder(str(image_tree))
    with pytest.raises(ImageError, match=r"flower_3.jpg: not a readable image"):
        written(tmp_path / "pack", source)
    pack = written(tmp_path / "pack", source, skip=True)
    assert [pack.manifest["splits"][name]["skipped"] for name in ("train", "val")] == [1, 1]
    keys = source.open("train").keys()
    keys.remove("flower/flower_3")
    assert list(pack.open("train").keys()) == keys
    assert pack.open("train").labels.tolist() == [int(key.startswith("pagoda")) for key in keys]
    assert pack.open("train")[3].key == "flower/flower_4"
    assert [line.partition(": ")[0][-12:] for line in (tmp_path / "pack" / "skipped.txt").read_text().splitlines()] == [
        "flower_3.jpg",
        "flower_0.jpg",
    ]
    unchecked = written(tmp_path / "unchecked", source, verify=False)
    assert len(unchecked.open("train")) == 16


@pytest.fixture
def finished(image_tree, tmp_path):
    written(tmp_path / "pack", ImageFolder(str(image_tree)))
    return tmp_path / "pack"


def cut(path):
    os.truncate(path / "train" / "00001.bin", 1000)


def edit(path, **values):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **values}))


DAMAGES = {
    "cut short": (cut, r"pack: train/00001.bin has 1000 bytes instead of \d+; it is cut short. Copy the pack again\.$"),
    "half copied": (
        lambda path: (path / "val" / "00000.bin").unlink(),
        r"val/00000.bin is missing; the pack was copied only in part",
    ),
    "no table": (lambda path: (path / "val" / "label.npy").unlink(), r"val/label.npy is missing"),
    "no manifest": (
        lambda path: (path / "manifest.json").unlink(),
        r"no pack \(no manifest.json\); write one with src/p",
    ),
    "no folder": (shutil.rmtree, r"no such folder. Set data.root to the folder of a pack"),
    "half manifest": (lambda path: os.truncate(path / "manifest.json", 100), r"manifest.json: cannot be read"),
    "newer": (lambda path: edit(path, format=9), r"written by a newer vitrail \(format 9\); update vitrail"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_packed__damaged(kind, finished):
    damage, message = DAMAGES[kind]
    damage(finished)
    with pytest.raises(ConfigError, match=message):
        Packed(str(finished))


def test_packed__damaged_bytes_and_no_folder(finished):
    path = finished / "train" / "00002.bin"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    assert list(Packed(str(finished)).damaged()) == [f"{path}: its checksum is wrong; copy or pack it again"]
    split = Packed(str(finished)).open("train")
    os.truncate(path, 100)  # after it was opened
    with pytest.raises(ImageError, match=r"00002.bin: is cut short, it ends before byte \d+; copy the file again"):
        split[12]
    with pytest.raises(ConfigError, match=r"data.root: not set. Set it to the folder of a pack"):
        Packed(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("size=100",), r"contains a pack with size=original, not size=100; choose another folder"),
        (("format=raw",), r"contains a pack with format=jpeg, not format=raw"),
        (("shard_images=7",), r"contains a pack with shard_images=5, not shard_images=7"),
        (("data.source.val_dir=train",), r"contains a pack of other data, or the data has changed since"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_pack__refuses_a_folder_with_another_pack(change, message, is_finished, image_tree, finished):
    if not is_finished:
        begun = json.loads((finished / "manifest.json").read_text())["begun"]
        (finished / "begun.json").write_text(json.dumps(begun))
        (finished / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=f"out={finished}: {message}"):
        pack(finished, f"data.root={image_tree}", *change)


def test_pack__refuses_a_folder_with_a_pack_of_other_classes(image_tree, finished):
    for split in ("train", "val"):
        (image_tree / split / "pagoda").rename(image_tree / split / "temple")
    with pytest.raises(ConfigError, match=f"out={finished}: contains a pack of other classes; choose another folder"):
        pack(finished, f"data.root={image_tree}")


def test_pack__refuses_a_folder_with_other_files(image_tree, tmp_path):
    with pytest.raises(ConfigError, match="contains other files; choose an empty or new folder"):
        pack(image_tree, f"data.root={image_tree}")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/pack: cannot be written to \(Not a directory\). Choose a folder"):
        pack(tmp_path / "file" / "pack", f"data.root={image_tree}")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").is_dir(), reason="root may write everywhere")
def test_pack__read_only_folder(image_tree, tmp_path):
    out = tmp_path / "closed"
    out.mkdir(mode=0o555)
    out = "/proc/self/pack" if os.geteuid() == 0 else out / "pack"
    with pytest.raises(ConfigError, match=r"out=.*pack: cannot be written to \(.+\). Choose a folder on a disk with"):
        pack(out, f"data.root={image_tree}", f"paths.cache={tmp_path}")


def test_pack__disk_full(image_tree, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ConfigError, match=r"pack: has 0.10 MiB free, but the pack needs about 0.\d\d MiB. Free some"):
        pack(tmp_path / "pack", f"data.root={image_tree}")
    monkeypatch.undo()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        ConfigError, match=r"cannot be written to \(No space left on device\).* the same command resumes"
    ):
        pack(tmp_path / "other", f"data.root={image_tree}")


class Unlabelled(Digits):
    """Digits, of which one split has no label."""

    def __init__(self, labels):
        self.given = labels

    def open(self, split):
        opened = super().open(split)
        opened.labels = self.given if split == "val" else opened.labels
        return opened


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "its val split has no labels"), (np.full(359, -1), "labels of its val split reach from -1 to -1")],
)
def test_pack__source_without_labels(labels, message, tmp_path):
    with pytest.raises(ConfigError, match=f"data.source: {message}.*a pack needs a class for every image"):
        PackWriter(tmp_path, Unlabelled(labels), PackOptions())


def synthetic(path, count):
    """Write a pack with a table of `count` images that all have the same bytes."""
    written(path, Digits(), shard_images=None)
    split = path / "train"
    data = (split / "00000.bin").read_bytes()
    keys = np.frombuffer(b"".join(b"n%08d_%08d" % (n // 1300, n) for n in range(1000)), np.uint8)
    zeros = np.zeros(count, np.int64)
    first = Table.open(split)
    arrays = {
        "file": np.zeros(count, np.int32),
        "offset": zeros,
        "size": zeros + int(first.size[0]),
        "label": np.arange(count) % 10,
        "key_text": np.tile(keys, count // 1000),
        "key_ends": np.arange(1, count + 1) * 18,
    }
    Table(arrays).save(split)
    (split / "00000.bin").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    about = manifest["splits"]["train"]
    about["images"] = count
    about["files"] = [{**file, "bytes": (split / file["name"]).stat().st_size} for file in about["files"]]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def own_memory():
    """Return the MiB of this process's memory that is not of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow  # 800 MB of tables
def test_packed__14_million_images(tmp_path):
    path = synthetic(tmp_path / "pack", 14_000_000)
    before, started = own_memory(), time.perf_counter()
    split = Packed(str(path)).open("train")
    seconds, opened = time.perf_counter() - started, own_memory() - before
    copy = pickle.dumps(split)
    rng = np.random.default_rng(0)
    for index in rng.integers(0, len(split), 20_000):
        sample = split[int(index)]
        assert sample.label == index % 10
    used = own_memory() - before
    print(f"opened in {seconds:.3f} s, {opened:.1f} MiB; {used:.1f} MiB after 20,000 images; pickled {len(copy)} bytes")
    assert len(split) == 14_000_000
    assert seconds < 2
    assert opened < 4
    assert used < 8
    assert len(copy) < 4096


def test_packed__size_of_the_table_does_not_matter(tmp_path):
    """As with 14 million images: opening takes no memory and hardly any time, and a pickle has no arrays."""
    path = synthetic(tmp_path / "pack", 1_000_000)
    before, started = own_memory(), time.perf_counter()
    split = Packed(str(path)).open("train")
    assert time.perf_counter() - started < 1
    assert own_memory() - before < 4
    assert len(pickle.dumps(split)) < 4096
    assert (len(split.keys()), split.keys()[999_999], split[123_456].label) == (1_000_000, "n00000000_00000999", 6)
