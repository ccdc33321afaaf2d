"""Checks of label maps against small stores whose faults and statistics are known."""

import numpy as np
import pytest

from vitrail.data.label_maps import LabelMapStore, checks
from vitrail.data.label_maps import store as stores
from vitrail.data.label_maps.checks import (
    Agreement,
    check_agreement,
    check_coverage,
    check_keys_match,
    check_names,
    check_parts,
    check_values,
    measure_agreement,
)


class Maps:
    """The parts of a store that the checks read, without their files."""

    def __init__(self, maps, num_classes=3, keys=None, about=None):
        self.maps, self.num_classes, self.about = maps, num_classes, about or {}
        self.keys = keys or [f"c/{index}" for index in range(len(maps))]
        self.grid, self.top_k = (1, 2), 2

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        scores, classes = self.maps[index]
        return np.array(scores, np.float16)[:, None], np.array(classes)[:, None]

    def key(self, index):
        return self.keys[index]


# Scores and classes (K, cells). Sums over cells for classes 0, 1, 2: 2, 4, 1 in the first and 5, 0, 6 in the second.
FIRST = ([[2, 3], [1, 1]], [[0, 1], [1, 2]])
SECOND = ([[5, 4], [1, 1]], [[2, 0], [0, 2]])


@pytest.mark.parametrize("chunk", [1, 512])
def test_agreement__by_hand(chunk, monkeypatch):
    """The first map's second cell lacks class 0; 1 of 4 cells."""
    monkeypatch.setattr(checks, "_CHUNK", chunk)
    agreement = measure_agreement(Maps([FIRST, SECOND]), np.array([0, 1]), np.array([0, 2]), 3)
    assert agreement.pooled.tolist() == [1, 2]
    assert agreement.top1 == 0.5
    assert agreement.cells_without == 0.25


def test_agreement__reads_the_given_records():
    agreement = measure_agreement(Maps([FIRST, SECOND]), np.array([1]), np.array([1]), 3)
    assert agreement.pooled.tolist() == [2]
    assert (agreement.top1, agreement.cells_without) == (0, 1)


def test_agreement__worst_classes():
    agreement = Agreement(np.array([0, 0, 1, 1, 1, 2]), np.array([0, 0, 1, 2, 2, 1]), 0.0)
    assert agreement.worst(2) == [(2, 1, 0.0, 1), (1, 3, 1 / 3, 2)]
    assert agreement.worst(9)[2:] == [(0, 2, 1.0, 0)]


@pytest.mark.parametrize(
    ("right", "level"), [(0, "error"), (130, "error"), (140, "warning"), (490, "warning"), (500, "ok"), (1000, "ok")]
)
def test_check_agreement__levels(right, level):
    """1000 images of 10 classes: chance 10 %, 4 standard deviations are 3.8 %; below 50 % is a warning."""
    labels = np.arange(1000) % 10
    pooled = np.where(np.arange(1000) < right, labels, (labels + 1) % 10)
    finding = check_agreement(Agreement(labels, pooled, 0.0), [f"class{number}" for number in range(10)])
    assert finding.level == level
    assert f"{right / 10:.1f}% of 1000 maps" in finding.text
    assert "chance: 10.0%" in finding.text


def test_check_agreement__few_images_need_not_be_four_deviations_above_chance():
    """4 images of 2 classes: chance 50 %, 4 deviations are 100 %; a quarter of the way to 100 % is 62.5 %."""
    labels = np.array([0, 1, 0, 1])
    assert check_agreement(Agreement(labels, np.array([0, 1, 1, 0]), 0.0), ["a", "b"]).level == "error"
    assert check_agreement(Agreement(labels, np.array([0, 1, 0, 1]), 0.0), ["a", "b"]).level == "ok"


def test_check_agreement__one_class_cannot_disagree():
    assert check_agreement(Agreement(np.zeros(5, int), np.zeros(5, int), 0.0), ["a"]).level == "ok"


def test_check_agreement__names_the_worst_class():
    agreement = Agreement(np.array([0, 1, 1, 1]), np.array([0, 2, 2, 0]), 0.0)
    text = check_agreement(agreement, ["cat", "dog", "fox"]).text
    assert text.index("dog") < text.index("fox")
    assert "cat" not in text


@pytest.mark.parametrize(
    ("names", "num_classes", "level", "text"),
    [
        (None, 3, "ok", "3 classes"),
        (["a", "b", "c"], 3, "ok", "3 classes"),
        (["a", "c", "b"], 3, "error", "2 of 3 classes differ, the first is class 1: c in the maps, b in the data"),
        (["a", "b"], 2, "error", "the data has 3"),
    ],
)
def test_check_names__levels(names, num_classes, level, text):
    about = {} if names is None else {"class_names": names}
    finding = check_names(Maps([], num_classes, about=about), ["a", "b", "c"])
    assert finding.level == level
    assert text in finding.text


@pytest.mark.parametrize(
    ("scores", "classes", "text"),
    [
        ([[1, 2], [1, float("nan")]], [[0, 1], [1, 2]], "not finite"),
        ([[1, 2], [1, float("inf")]], [[0, 1], [1, 2]], "not finite"),
        ([[1, 2], [1, 1]], [[0, 1], [1, 3]], "class 3"),
        ([[1, 2], [1, 1]], [[0, 1], [1, 1]], "twice"),
    ],
)
def test_check_values__damaged_map_is_named(scores, classes, text):
    """The second map is damaged; a sample without it passes."""
    maps = Maps([FIRST, (scores, classes), SECOND])
    finding = check_values(maps, np.array([0, 1, 2]))
    assert finding.level == "error"
    assert "c/1" in finding.text
    assert text in finding.text
    finding = check_values(maps, np.array([0, 2]))
    assert finding.level == "ok"
    assert "2" in finding.text


@pytest.mark.parametrize(
    ("records", "level", "text"),
    [
        ([0, 1, 2], "ok", "every image"),
        ([2, 0, 1], "ok", "every image"),
        ([0, 2, 2], "warning", "1 of 3 maps"),
        ([0, -1, 1], "error", "1 of 3 images have no map, the first is i/1"),
        ([-1, -1, -1], "error", "c/0"),
    ],
)
def test_check_keys__images_without_map_and_maps_without_image(records, level, text):
    finding = check_keys_match(Maps([FIRST] * 3), ["i/0", "i/1", "i/2"], np.array(records))
    assert finding.level == level
    assert text in finding.text


@pytest.mark.parametrize(
    ("coverage", "oblong", "level"),
    [
        ("whole image", 1.0, "ok"),
        ("center square", 0.25, "warning"),
        ("center square", 0.0, "ok"),
        (None, 0.0, "warning"),
    ],
)
def test_check_coverage__levels(coverage, oblong, level):
    finding = check_coverage(Maps([], about={} if coverage is None else {"coverage": coverage}), oblong)
    assert finding.level == level
    assert "1 x 2 cells, top 2" in finding.text
    assert ("25%" in finding.text) == (oblong == 0.25)


def test_check_parts__names_the_damaged_records(tmp_path, monkeypatch):
    """Five records of 16 bytes, two for each checksum; a byte of record 3 and one of record 4 are changed."""
    monkeypatch.setattr(stores, "_PART", 32)
    writer = LabelMapStore.create(tmp_path / "maps", 5, 2, (1, 2), 3, [f"c/{index}" for index in range(5)])
    for index in range(5):
        writer.write(index, np.ones((2, 1, 2)), np.array([[[0, 1]], [[1, 2]]]))
    store = writer.finish()
    (finding,) = check_parts(store)
    assert finding.level == "ok"
    assert "3" in finding.text
    with (store.path / "maps.bin").open("r+b") as file:
        for record in (3, 4):
            file.seek(16 * record)
            file.write(b"?")
    findings = list(check_parts(store))
    assert [finding.level for finding in findings] == ["error", "error"]
    assert "records 2 to 3 (c/2 to c/3)" in findings[0].text
    assert "records 4 to 4 (c/4 to c/4)" in findings[1].text
