"""ImageNet in the layouts in which it is published: the same images, classes and keys as in class folders."""

import importlib.util
import pickle
import tarfile

import numpy as np
import pytest

import layouts
from vitrail.data.sources import ImageNet, ImageNetArchives, ImageNetKaggle, ImageNetReal, Parquet, WebDataset
from vitrail.errors import ConfigError, ImageError

pytestmark = pytest.mark.thorough

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
SOURCES = {
    "archives": (layouts.write_archives, ImageNetArchives, {}),
    "kaggle": (layouts.write_kaggle, ImageNetKaggle, {}),
    "webdataset": (layouts.write_webdataset, WebDataset, {"classes": "imagenet-1k"}),
    "parquet": (layouts.write_parquet, Parquet, {"classes": "imagenet-1k"}),
}
MARKS = {"parquet": needs_pyarrow}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return ImageNet(str(layouts.write_folders(tmp_path_factory.mktemp("imagenet") / "folders")))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in SOURCES])
def release(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write, source, options = SOURCES[request.param]
    root, cache = write(folder / "data"), {"index": str(folder / "cache")}
    return request.param, root, lambda **more: source(str(root), **{**options, **cache, **more})


@pytest.mark.parametrize("split", ["train", "val"])
def test_release__same_images_as_class_folders(folders, release, split):
    name, _, make = release
    expected, source = folders.open(split), make()
    source.prepare()
    found = source.open(split)
    assert source.classes == folders.classes
    keys = list(found.keys())
    if name in ("archives", "kaggle"):  # even in the same order
        assert keys == expected.keys()
    assert sorted(keys) == sorted(expected.keys())
    place = {key: index for index, key in enumerate(expected.keys())}
    order = [place[key] for key in keys]
    np.testing.assert_array_equal(found.labels, expected.labels[order])
    for index in (0, 1, 2, 500, len(found) - 1):
        sample, same = found[index], expected[order[index]]
        assert (sample.label, sample.key) == (same.label, same.key)
        assert np.array_equal(np.asarray(sample.image), np.asarray(same.image))
        assert found.encoded(index).data == expected.encoded(order[index]).data
    again = pickle.loads(pickle.dumps(make().open(split)))  # from the cache, in another process
    assert list(again.keys()) == keys
    assert again[7].image.tobytes() == found[7].image.tobytes()


def test_release__real_labels(folders, release):
    _, _, make = release
    expected = ImageNetReal(str(folders.root)).open("val")
    found = ImageNetReal(images=make()).open("val")
    by_key = dict(zip(expected.keys(), expected.label_sets, strict=True))
    keys = found.keys()
    assert [by_key[key] for key in keys] == found.label_sets
    assert found[3].image.tobytes() == make().open("val")[3].image.tobytes()


def test_archives__labels_from_the_unpacked_kit_or_from_kaggle(folders, tmp_path):
    root = layouts.write_archives(tmp_path / "archives")
    expected = folders.open("val").labels
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz") as archive:
        archive.extractall(root, filter="data")
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    np.testing.assert_array_equal(ImageNetArchives(str(root), train=None).open("val").labels, expected)
    (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"no file of MATLAB's")
    with pytest.raises(ConfigError, match=r"ground_truth.txt: is not the development kit of ILSVRC 2012, or damaged"):
        ImageNetArchives(str(root), train=None).open("val")
    for file in (root / "ILSVRC2012_devkit_t12" / "data").iterdir():
        file.unlink()
    with pytest.raises(
        ConfigError, match=r"no labels of the validation images. Put ILSVRC2012_devkit_t12.tar.gz there"
    ):
        ImageNetArchives(str(root), train=None).open("val")
    layouts.write_solution(root)
    source = ImageNetArchives(str(root), train=None)
    np.testing.assert_array_equal(source.open("val").labels, expected)
    assert source.splits == ("val",)
    with pytest.raises(ConfigError, match=r"data\.source\.train: not set"):
        source.open("train")


def test_archives__damaged(tmp_path):
    root = layouts.write_archives(tmp_path / "archives")
    train = root / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"img_train.tar: is cut short or damaged after n\d{8}.tar \(unexpected end"):
        ImageNetArchives(str(root)).open("train")
    middle = whole.index(b"n01440764_997.JPEG")
    train.write_bytes(whole[:middle] + b"\xff" * 512 + whole[middle + 512 :])
    with pytest.raises(ConfigError, match=r"train.tar: n01440764.tar: is cut short or damaged after its start \(bad"):
        ImageNetArchives(str(root)).open("train")
    train.write_bytes(layouts.tarred([("n01440764.tar", layouts.tarred([]))]))
    with pytest.raises(ConfigError, match=r"its 1 archives are not the 1000 classes of ImageNet-1k \(999 missing"):
        ImageNetArchives(str(root)).open("train")
    train.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(ConfigError, match=r"is compressed with gzip, .* Decompress it first"):
        ImageNetArchives(str(root)).open("train")
    (root / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(ConfigError, match=r"contains no ILSVRC2012_img_val.tar. Put the archive there"):
        ImageNetArchives(str(root))


def test_archives__damaged_image_is_named(tmp_path):
    root = layouts.write_archives(tmp_path / "archives")
    val = root / "ILSVRC2012_img_val.tar"
    whole, broken = val.read_bytes(), layouts.content(*layouts.val_images()[6])
    val.write_bytes(whole.replace(broken, b"x" * len(broken)))
    split = ImageNetArchives(str(root), train=None).open("val")
    index = next(i for i, key in enumerate(split.keys()) if key.endswith("val_00000007"))
    with pytest.raises(ImageError, match=r"img_val.tar: n\d{8}/ILSVRC2012_val_00000007: not a readable image"):
        split[index]


def test_archives__index_follows_changes(tmp_path):
    root = layouts.write_archives(tmp_path / "archives")
    cache = str(tmp_path / "cache")
    before = ImageNetArchives(str(root), train=None, index=cache).open("val")
    (root / "ILSVRC2012_img_val.tar").write_bytes(
        layouts.tarred((f"{name}.JPEG", layouts.content(name, label)) for name, label in layouts.val_images()[:10])
    )
    after = ImageNetArchives(str(root), train=None, index=cache).open("val")
    assert (len(before), len(after)) == (1000, 10)


def test_kaggle__invalid_folders(tmp_path):
    root = layouts.write_kaggle(tmp_path / "kaggle")
    (root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "cat.JPEG").write_bytes(layouts.picture(0, 0))
    with pytest.raises(ConfigError, match=r"LOC_val_solution.csv: has no label for the validation image val/cat.JPEG"):
        ImageNetKaggle(str(root)).open("val")
    (root / "LOC_val_solution.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="must have the columns ImageId and PredictionString"):
        ImageNetKaggle(str(root)).open("val")
    (root / "LOC_val_solution.csv").unlink()
    with pytest.raises(ConfigError, match=r"contains no LOC_val_solution.csv, which has the labels"):
        ImageNetKaggle(str(root)).open("val")
    with pytest.raises(ConfigError, match=r"contains no folder ILSVRC/Data/CLS-LOC/train"):
        ImageNetKaggle(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.root: not set"):
        ImageNetKaggle(None)


def shards(root, *samples, split="train"):
    """Write one shard with files of each sample: {extension: content}."""
    root.mkdir(exist_ok=True)
    files = [
        (f"{number:03d}.{extension}", data if isinstance(data, bytes) else str(data).encode())
        for number, sample in enumerate(samples)
        for extension, data in sample.items()
    ]
    (root / f"{split}-0.tar").write_bytes(layouts.tarred(files))
    return root


IMAGE = layouts.picture(3, 3)


@pytest.mark.parametrize(
    ("samples", "classes", "labels"),
    [
        ([{"jpg": IMAGE, "cls": 1, "txt": "dog"}, {"png": IMAGE, "cls": 0, "txt": "cat"}], ["cat", "dog"], [1, 0]),
        ([{"jpg": IMAGE, "txt": "zebra"}, {"jpg": IMAGE, "txt": "ape"}], ["ape", "zebra"], [1, 0]),
        ([{"jpg": IMAGE, "cls": "zebra"}, {"jpg": IMAGE, "cls": "ape"}], ["ape", "zebra"], [1, 0]),
        ([{"jpg": IMAGE, "json": '{"label": 0, "class_name": "cow"}'}], ["cow"], [0]),
        ([{"seg.png": IMAGE, "json": '{"label": "cow"}'}, {"txt": "no image"}], ["cow"], [0]),
    ],
)
def test_webdataset__classes_that_the_samples_name(samples, classes, labels, tmp_path):
    root = shards(tmp_path / "shards", *samples)
    shards(root, *samples, split="val")
    source = WebDataset(str(root))
    assert source.classes == classes
    split = source.open("train")
    assert split.labels.tolist() == labels
    assert split[0].key == "000"
    assert split[0].image.size == (8, 6)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([{"jpg": IMAGE}], {}, r"000 has no label; add a file 000.cls, .txt or .json"),
        ([{"jpg": IMAGE, "cls": 0}], {}, r"000 has a class index but no class name. Set data.source.classes"),
        ([{"jpg": IMAGE, "cls": 1, "txt": "dog"}], {}, r"not every class index has samples with a name"),
        ([{"jpg": IMAGE, "cls": 5}], {"classes": ["a"]}, r"000 has the class 5, which is not one of the 1 classes"),
        ([{"jpg": IMAGE, "json": "{"}], {}, r"000.json is not valid"),
        ([{"txt": "x"}], {"classes": ["a"]}, r"contains no images"),
        ([{"jpg": IMAGE, "cls": 0}], {"train": "train-{0..1}.tar", "classes": ["a"]}, r"1 of 2 shards are missing"),
        ([{"jpg": IMAGE, "cls": 0}], {"train": "x*.tar"}, r"contains no x\*.tar. Set data.source.train"),
    ],
)
def test_webdataset__invalid(samples, options, message, tmp_path):
    root = shards(tmp_path / "shards", *samples)
    shards(root, *samples, split="val")
    with pytest.raises(ConfigError, match=message):
        WebDataset(str(root), **options).open("train")


def test_webdataset__class_names_from_a_file_and_another_order_of_classes(tmp_path):
    root = shards(tmp_path / "shards", {"jpg": IMAGE, "cls": 1})
    shards(root, {"jpg": IMAGE, "cls": 0}, split="val")
    (root / "classes.txt").write_text("cat\ndog\n")
    assert WebDataset(str(root)).open("train")[0].label == 1
    (root / "classes.txt").unlink()
    (root / "train-0.tar").write_bytes(layouts.tarred([("n01440764_1.jpg", IMAGE), ("n01440764_1.cls", b"1")]))
    with pytest.raises(ConfigError, match=r"n01440764_1 is an image of n01440764, but its label is that of n01443537"):
        WebDataset(str(root), classes="imagenet-1k").open("train")


@needs_pyarrow
def test_parquet__classes_of_the_file_and_keys_without_names(tmp_path):
    root = layouts.write_parquet(tmp_path / "hub")
    source = Parquet(str(root))
    assert source.classes[:2] == ["thing 0", "thing 1"]
    assert source.open("val").keys()[0] == "ILSVRC2012_val_00000001_" + layouts.WNIDS[layouts.VAL_LABELS[0]]
    with pytest.raises(ConfigError, match=r"has no column picture, only image, label; set data.source.image"):
        Parquet(str(root), image="picture").open("val")
    with pytest.raises(ConfigError, match=r"does not name its classes. Set data.source.classes"):
        Parquet(str(root), label="image")
    with pytest.raises(ConfigError, match=r"has the label \d+, but there are 2 classes"):
        Parquet(str(root), classes=["a", "b"]).open("val")
    with pytest.raises(ConfigError, match=r"contains no test-\*. Set data.source.val"):
        Parquet(str(root), val="test-*")
    next(root.glob("data/train-00001*")).write_bytes(b"PAR1 but no more")
    with pytest.raises(ConfigError, match=r"train-00001-of-00002.parquet: is not a parquet file, or damaged"):
        Parquet(str(root)).open("train")


def test_parquet__without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("train-0.parquet", "validation-0.parquet"):
        (tmp_path / "data" / name).touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"parquet files need pyarrow; install it with: pip install pyarrow\."):
        Parquet(str(tmp_path))
