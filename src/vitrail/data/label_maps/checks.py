"""What can be wrong with label maps, looked for before a training learns it.

Each check gives findings; the data module runs the quick ones at every training start, `src/doctor.py` all of them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrail.data.label_maps.store import LabelMapStore

_CHUNK = 512  # maps held at a time


class Finding(NamedTuple):
    """One result: what was looked at, how it stands, what was found, and what to do where it is not well."""

    check: str
    level: Literal["ok", "warning", "error"]
    text: str
    advice: str = ""


class Agreement(NamedTuple):
    """How the pooled label maps of some images compare with the classes that the data set says."""

    labels: NDArray[np.int64]  # (N,) true classes
    pooled: NDArray[np.int64]  # (N,) best class of each map's mean scores
    cells_without: float  # share of cells, over all maps, whose top K lack the true class

    @property
    def top1(self) -> float:
        """Share of images whose pooled map says the true class."""
        return float((self.pooled == self.labels).mean())

    def worst(self, count: int) -> list[tuple[int, int, float, int]]:
        """The classes that agree least: (class, images, share that agrees, what its maps say most)."""
        rows = []
        for label in np.unique(self.labels):
            said = self.pooled[self.labels == label]
            rows.append((int(label), len(said), float((said == label).mean()), int(np.bincount(said).argmax())))
        return sorted(rows, key=lambda row: (row[2], -row[1]))[:count]


def measure_agreement(
    store: LabelMapStore, records: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int
) -> Agreement:
    """Read the maps of some images and compare them with their classes.

    Args:
        store: the maps.
        records: (N,) of the images.
        labels: (N,) their classes.
        num_classes: C, of maps and data alike.
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


def sample_of(count: int, size: int) -> NDArray[np.int64]:
    """`size` of `count` indices, evenly spread, the same every time."""
    return np.unique(np.linspace(0, count - 1, min(size, count)).round().astype(np.int64))


def check_names(store: LabelMapStore, classes: Sequence[str]) -> Finding:
    """Number and order of the classes against the data's."""
    if store.num_classes != len(classes):
        return Finding(
            "classes",
            "error",
            f"maps of {store.num_classes} classes, the data has {len(classes)}",
            "annotate this data, or train on the data that the maps are of",
        )
    names = store.about.get("class_names")
    if names is None:
        return Finding("classes", "ok", f"{len(classes)} classes; the maps do not name theirs")
    wrong = [index for index, (ours, theirs) in enumerate(zip(classes, names, strict=True)) if ours != theirs]
    if not wrong:
        return Finding("classes", "ok", f"{len(classes)} classes of the same names in the same order")
    first = wrong[0]
    return Finding(
        "classes",
        "error",
        f"{len(wrong)} of {len(classes)} classes differ, the first is class {first}: {names[first]} in the maps,"
        f" {classes[first]} in the data",
        "annotate again; the class folders were renamed, added or removed since",
    )


def check_agreement(agreement: Agreement, classes: Sequence[str]) -> Finding:
    """Pooled top-1 against the true classes: maps of another class order agree no better than chance."""
    count = len(agreement.labels)
    shares = np.bincount(agreement.labels, minlength=len(classes)) / count
    chance = float((shares * np.bincount(agreement.pooled, minlength=len(classes)) / count).sum())
    spread = math.sqrt(max(chance * (1 - chance), 0.0) / count)
    limit = chance + min(
        4 * spread, (1 - chance) / 4
    )  # a quarter of the way: four spreads of a few images are too many
    text = f"{agreement.top1:.1%} of {count} maps agree with their image's class (chance: {chance:.1%})"
    label, images, share, said = agreement.worst(1)[0]
    if agreement.top1 <= limit and chance < 1:
        return Finding(
            "agreement",
            "error",
            f"{text}; {classes[label]} is mostly called {classes[said]}",
            "these maps are of another class order or of other images; annotate this data",
        )
    if agreement.top1 < 0.5:
        return Finding(
            "agreement",
            "warning",
            f"{text}; worst is {classes[label]}, {share:.0%} of {images}, mostly called {classes[said]}",
            "a better annotator gives better labels",
        )
    return Finding("agreement", "ok", text)


def check_values(store: LabelMapStore, records: NDArray[np.int64]) -> Finding:
    """Scores finite, classes in range, each class once a cell."""
    for record in map(int, records):
        scores, classes = store[record]
        key = store.key(record)
        again = "annotate or import again: these maps are damaged"
        if not np.isfinite(scores).all():
            return Finding("values", "error", f"the map of {key} holds scores that are not finite", again)
        if int(classes.min()) < 0 or int(classes.max()) >= store.num_classes:
            what = f"the map of {key} holds class {int(classes.max())}, there are {store.num_classes}"
            return Finding("values", "error", what, again)
        ordered = np.sort(classes, axis=0)
        if (ordered[1:] == ordered[:-1]).any():
            return Finding("values", "error", f"the map of {key} holds a class twice in one cell", again)
    return Finding("values", "ok", f"scores finite and classes in range in {len(records)} maps looked at")


def check_keys_match(store: LabelMapStore, keys: Sequence[str], records: NDArray[np.int64]) -> Finding:
    """Images without a map, and maps without an image.

    Args:
        store: the maps.
        keys: of the images.
        records: their maps, -1 where there is none.
    """
    missing = np.flatnonzero(records < 0)
    unused = len(store) - len(np.unique(records[records >= 0]))
    if len(missing) == len(keys):
        return Finding(
            "keys",
            "error",
            f"holds no map of any image; its keys look like {store.key(0)}, the images' like {keys[0]}",
            "annotate this data, or give the folder that the maps were made of",
        )
    if len(missing):
        return Finding(
            "keys",
            "error",
            f"{len(missing)} of {len(keys)} images have no map, the first is {keys[missing[0]]}",
            "data.on_missing_map=ignore lets their tokens learn the image's label",
        )
    if unused:
        text = f"every image has a map; {unused} of {len(store)} maps have no image"
        return Finding("keys", "warning", text, "images were removed since; nothing to do if that was meant")
    return Finding("keys", "ok", "every image has a map and every map an image")


def check_coverage(store: LabelMapStore, oblong: float = 1.0) -> Finding:
    """Whether maps and crops speak of the same picture.

    Args:
        store: the maps.
        oblong: share of the images that are not square.
    """
    grid = f"{store.grid[0]} x {store.grid[1]} cells, top {store.top_k}"
    coverage = store.about.get("coverage")
    if coverage == "center square" and oblong:
        return Finding(
            "coverage",
            "warning",
            f"{grid}, of the central square only, as published; {oblong:.0%} of the images are not square",
            "what lies outside of the square has no label; annotate with crop=whole",
        )
    if coverage is None:
        return Finding("coverage", "warning", f"{grid}; these maps do not say what they cover", "look at a preview")
    return Finding("coverage", "ok", f"{grid}, of the {coverage}")


def check_parts(store: LabelMapStore) -> Iterator[Finding]:
    """Checksums; reads the whole store."""
    damaged = list(store.damaged_parts())
    for first, last in damaged:
        text = f"maps.bin is damaged within records {first} to {last} ({store.key(first)} to {store.key(last)})"
        yield Finding("checksums", "error", text, "copy the maps again, or annotate again")
    if not damaged:
        yield Finding("checksums", "ok", f"all as written, in {len(store.manifest['sha256'])} parts")
