"""Checks of label maps before training.

Each check returns findings. The data module runs the quick checks whenever training starts, `src/doctor.py` runs all.

Shapes: N images, C classes, K scores per cell.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrail.data.label_maps.store import LabelMapStore

_CHUNK = 512  # maps in memory at a time


class Finding(NamedTuple):
    """Result of one check: its name, the level, what was found, and what to do about it."""

    check: str
    level: Literal["ok", "warning", "error"]
    text: str
    advice: str = ""


class Agreement(NamedTuple):
    """Comparison of the pooled label maps of some images with the classes of the data set."""

    labels: NDArray[np.int64]  # (N,) true classes
    pooled: NDArray[np.int64]  # (N,) best class of each map's mean scores
    cells_without: float  # share of cells, over all maps, whose top K lack the true class

    @property
    def top1(self) -> float:
        """Share of images whose pooled map has the true class as best class."""
        return float((self.pooled == self.labels).mean())

    def worst(self, count: int) -> list[tuple[int, int, float, int]]:
        """Return the classes that agree least: (class, images, share that agrees, most frequent pooled class)."""
        rows = []
        for label in np.unique(self.labels):
            predicted = self.pooled[self.labels == label]
            rows.append(
                (int(label), len(predicted), float((predicted == label).mean()), int(np.bincount(predicted).argmax()))
            )
        return sorted(rows, key=lambda row: (row[2], -row[1]))[:count]


def measure_agreement(
    store: LabelMapStore, records: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int
) -> Agreement:
    """Read the label maps of some images and compare them with the images' classes.

    Args:
        store: the label maps.
        records: (N,) records of the images.
        labels: (N,) classes of the images.
        num_classes: C, the same for label maps and data.
    """
    pooled, without, cells = np.empty(len(records), np.int64), 0, 0
    for start in range(0, len(records), _CHUNK):
        part = slice(start, start + _CHUNK)
        scores, classes = (np.stack(arrays) for arrays in zip(*(store[int(i)] for i in records[part]), strict=True))
        rows = np.arange(len(scores))[:, None] * num_classes
        flat = rows + classes.reshape(len(scores), -1).astype(np.int64)
        sums = np.bincount(flat.ravel(), scores.reshape(-1).astype(np.float64), len(scores) * num_classes)
        pooled[part] = sums.reshape(len(scores), num_classes).argmax(1)
        seen = (classes == labels[part, None, None, None]).any(1)
        without, cells = without + int((~seen).sum()), cells + seen.size
    return Agreement(labels, pooled, without / max(cells, 1))


def check_names(store: LabelMapStore, classes: Sequence[str]) -> Finding:
    """Compare number, names and order of the classes with the data's."""
    if store.num_classes != len(classes):
        return Finding(
            "classes",
            "error",
            f"the maps have {store.num_classes} classes, the data has {len(classes)}",
            "annotate this data, or train on the data that was annotated",
        )
    names = store.about.get("class_names")
    if names is None:
        return Finding("classes", "ok", f"{len(classes)} classes; the maps contain no class names")
    wrong = [
        index for index, (data_name, map_name) in enumerate(zip(classes, names, strict=True)) if data_name != map_name
    ]
    if not wrong:
        return Finding("classes", "ok", f"{len(classes)} classes with the same names in the same order")
    first = wrong[0]
    return Finding(
        "classes",
        "error",
        f"{len(wrong)} of {len(classes)} classes differ, the first is class {first}: {names[first]} in the maps,"
        f" {classes[first]} in the data",
        "annotate again; class folders were renamed, added or removed after the annotation",
    )


def check_agreement(agreement: Agreement, classes: Sequence[str]) -> Finding:
    """Compare pooled top-1 with the true classes; maps in another class order agree no better than chance."""
    count = len(agreement.labels)
    shares = np.bincount(agreement.labels, minlength=len(classes)) / count
    chance = float((shares * np.bincount(agreement.pooled, minlength=len(classes)) / count).sum())
    spread = math.sqrt(max(chance * (1 - chance), 0.0) / count)
    limit = chance + min(
        4 * spread, (1 - chance) / 4
    )  # a quarter of the way: four spreads of a few images are too many
    text = f"{agreement.top1:.1%} of {count} maps agree with their image's class (chance: {chance:.1%})"
    label, images, share, predicted = agreement.worst(1)[0]
    if agreement.top1 <= limit and chance < 1:
        return Finding(
            "agreement",
            "error",
            f"{text}; {classes[label]} is mostly labelled {classes[predicted]}",
            "these maps have another class order, belong to other images or come from a poor annotator; annotate again",
        )
    if agreement.top1 < 0.5:
        return Finding(
            "agreement",
            "warning",
            f"{text}; worst is {classes[label]}, {share:.0%} of {images}, mostly labelled {classes[predicted]}",
            "use a better annotator for better labels",
        )
    return Finding("agreement", "ok", text)


def check_values(store: LabelMapStore, records: NDArray[np.int64]) -> Finding:
    """Check that scores are finite, classes in range and not repeated in a cell; `records` are indices (R,)."""
    for record in map(int, records):
        scores, classes = store[record]
        key = store.key(record)
        advice = "annotate or import again; these maps are damaged"
        if not np.isfinite(scores).all():
            return Finding("values", "error", f"the map of {key} contains scores that are not finite", advice)
        if int(classes.min()) < 0 or int(classes.max()) >= store.num_classes:
            what = f"the map of {key} contains class {int(classes.max())}, but there are {store.num_classes} classes"
            return Finding("values", "error", what, advice)
        ordered = np.sort(classes, axis=0)
        if (ordered[1:] == ordered[:-1]).any():
            return Finding("values", "error", f"the map of {key} contains a class twice in one cell", advice)
    return Finding("values", "ok", f"scores finite and classes in range in {len(records)} sampled maps")


def check_keys_match(store: LabelMapStore, keys: Sequence[str], records: NDArray[np.int64]) -> Finding:
    """Find images without a label map, and label maps without an image.

    Args:
        store: the label maps.
        keys: keys of the N images.
        records: (N,) records of the images, -1 for images without a label map.
    """
    missing = np.flatnonzero(records < 0)
    unused = len(store) - len(np.unique(records[records >= 0]))
    if len(missing) == len(keys):
        return Finding(
            "keys",
            "error",
            f"contains no map of any image; its keys look like {store.key(0)}, the images' keys like {keys[0]}",
            "annotate this data, or set data.root to the folder that was annotated",
        )
    if len(missing):
        return Finding(
            "keys",
            "error",
            f"{len(missing)} of {len(keys)} images have no map, the first is {keys[missing[0]]}",
            "annotate this data, or set data.on_missing_map=ignore to use the image's label for all its tokens",
        )
    if unused:
        text = f"every image has a map; {unused} of {len(store)} maps have no image"
        return Finding(
            "keys", "warning", text, "images were removed after the annotation; ignore this if it was intended"
        )
    return Finding("keys", "ok", "every image has a map and every map an image")


def check_coverage(store: LabelMapStore, oblong: float = 1.0) -> Finding:
    """Check that the label maps cover the whole images.

    Args:
        store: the label maps.
        oblong: share of the images that are not square.
    """
    grid = f"{store.grid[0]} x {store.grid[1]} cells, top {store.top_k}"
    coverage = store.about.get("coverage")
    if coverage == "center square" and oblong:
        return Finding(
            "coverage",
            "warning",
            f"{grid}, covering only the central square, as published; {oblong:.0%} of the images are not square",
            "the area outside the square has no labels; annotate with crop=whole",
        )
    if coverage is None:
        return Finding(
            "coverage", "warning", f"{grid}; the manifest does not state what the maps cover", "check a preview"
        )
    return Finding("coverage", "ok", f"{grid}, covering the {coverage}")


def check_parts(store: LabelMapStore) -> Iterator[Finding]:
    """Verify all checksums; reads the whole store."""
    damaged = list(store.damaged_parts())
    for first, last in damaged:
        text = f"maps.bin is damaged within records {first} to {last} ({store.key(first)} to {store.key(last)})"
        yield Finding("checksums", "error", text, "copy the maps again, or annotate again")
    if not damaged:
        yield Finding("checksums", "ok", f"match in all parts ({len(store.manifest['sha256'])})")
