"""ImageNet-1k in each layout in which it is published, with a few tiny images: the same images in all of them."""

import csv
import io
import json
import tarfile
from functools import cache

import numpy as np
from PIL import Image

from vitrail.data.sources.imagenet import synsets

WNIDS = synsets("imagenet-1k")
VAL_LABELS = np.random.default_rng(0).permutation(1000)  # class of each validation image, in the order of the numbers
KIT_IDS = np.random.default_rng(1).permutation(1000) + 1  # the development kit's id of each class


@cache
def picture(label, number):
    """Return an image file whose pixels are a function of class and number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (label // 256, label % 256, number % 256)).save(stream, "PNG")
    return stream.getvalue()


def train_images():
    """Return (name, class) of the training images in the order of class folders."""
    numbers = {0: ("10026", "9", "997")}
    return [(f"{wnid}_{number}", label) for label, wnid in enumerate(WNIDS) for number in numbers.get(label, ("1",))]


def val_images():
    """Return (name, class) of the validation images in the order of their numbers."""
    return [(f"ILSVRC2012_val_{number:08d}", int(label)) for number, label in enumerate(VAL_LABELS, start=1)]


def content(name, label):
    return picture(label, int(name.rpartition("_")[2]))


def write_folders(root):
    for split, images in (("train", train_images()), ("val", val_images())):
        for name, label in images:
            folder = root / split / WNIDS[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.JPEG").write_bytes(content(name, label))
    return root


def add(archive, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def tarred(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files:
            add(archive, name, data)
    return stream.getvalue()


def devkit():
    """Return the files of the development kit: class ids, with groups of classes after them, and the ground truth."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    by_id = sorted(zip(KIT_IDS.tolist(), WNIDS, strict=True))
    rows = [(number, wnid, "words", 0) for number, wnid in by_id] + [(1001, "n00001740", "entity", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields)[:, None]})
    truth = "".join(f"{KIT_IDS[label]}\n" for label in VAL_LABELS).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    return {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}


def write_archives(root):
    root.mkdir()
    images: dict[str, list[tuple[str, bytes]]] = {}
    for name, label in train_images():
        images.setdefault(WNIDS[label], []).insert(0, (f"{name}.JPEG", content(name, label)))  # in no order
    (root / "ILSVRC2012_img_train.tar").write_bytes(
        tarred((f"{wnid}.tar", tarred(files)) for wnid, files in reversed(images.items()))
    )
    (root / "ILSVRC2012_img_val.tar").write_bytes(
        tarred((f"{name}.JPEG", content(name, label)) for name, label in val_images())
    )
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in devkit().items():
            add(archive, name, data)
    return root


def write_solution(root):
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = [
            (name, f"{WNIDS[label]} 85 1 499 272 {WNIDS[label]} 1 1 9 9 ") for name, label in reversed(val_images())
        ]
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])


def write_kaggle(root):
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    for name, label in train_images():
        (images / "train" / WNIDS[label]).mkdir(parents=True, exist_ok=True)
        (images / "train" / WNIDS[label] / f"{name}.JPEG").write_bytes(content(name, label))
    (images / "val").mkdir()
    for name, label in val_images():
        (images / "val" / f"{name}.JPEG").write_bytes(content(name, label))
    write_solution(root)
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a thing, another name\n" for wnid in WNIDS))
    return root


def write_webdataset(root):
    root.mkdir()
    for split, images in (("train", train_images()), ("validation", val_images())):
        for shard in range(2):
            files = []
            for name, label in images[shard::2]:
                files += [(f"{name}.cls", str(label).encode()), (f"{name}.jpg", content(name, label))]
                files.append((f"{name}.json", json.dumps({"label": label, "filename": f"{name}.JPEG"}).encode()))
            (root / f"imagenet1k-{split}-{shard:04d}.tar").write_bytes(tarred(files))
    return root


def write_parquet(root, names=None, group=100):
    import pyarrow as pa
    from pyarrow import parquet

    (root / "data").mkdir(parents=True)
    label_type = {"names": names or [f"thing {index}" for index in range(1000)], "_type": "ClassLabel"}
    described = {"info": {"features": {"image": {"_type": "Image"}, "label": label_type}}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps(described)},
    )
    for split, images in (("train", train_images()), ("validation", val_images())):
        for shard in range(2):
            rows = [
                {
                    "image": {"bytes": content(name, label), "path": f"{name}_{WNIDS[label]}.JPEG"},
                    "label": label,
                }
                for name, label in images[shard::2]
            ]
            path = root / "data" / f"{split}-{shard:05d}-of-00002.parquet"
            parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return root
