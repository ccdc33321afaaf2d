"""Tables of images in arrays, and their cache."""

import os
from pathlib import Path

import numpy as np
import pytest

from vitrail.data.sources.ranges import Files
from vitrail.data.sources.tables import Strings, TableBuilder, cached
from vitrail.errors import ImageError

NAMES = ["a", "", "ünï", "n01440764/n01440764_10026", "\udcff.jpg"]


def test_strings__as_a_list(monkeypatch):
    monkeypatch.setattr("vitrail.data.sources.tables._BLOCK", 2)
    strings = Strings.of(NAMES)
    assert (len(strings), list(strings), strings[1:4], strings[-1]) == (5, NAMES, NAMES[1:4], NAMES[-1])
    assert "ünï" in strings
    with pytest.raises(IndexError, match="string 5 of 5"):
        strings[5]
    assert list(Strings.of([])) == []


def small_table(label=0):
    builder = TableBuilder()
    for number, name in enumerate(NAMES):
        builder.add(0, number, 1, label, name)
    return builder.table()


@pytest.mark.parametrize("change", [None, "file", "about", "damage"])
def test_cached__built_again_after_a_change(change, tmp_path):
    file, cache, calls = tmp_path / "a.tar", tmp_path / "cache", []
    file.write_bytes(b"1234567890")

    def table(about):
        return cached(cache, [file], {"about": about}, lambda: (calls.append(1), small_table(len(calls)))[1])

    assert table(0).labels.tolist() == [1] * 5
    if change == "file":
        os.utime(file, (0, 0))
    elif change == "damage":
        next(cache.glob("table-*/label.npy")).write_bytes(b"")
    again = table(int(change == "about"))
    assert again.labels.tolist() == [1 if change is None else 2] * 5
    assert list(again.keys) == NAMES
    assert again.folder is not None
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_cached__folder_not_writable(tmp_path):
    (tmp_path / "cache").touch()
    assert len(cached(tmp_path / "cache", [tmp_path / "cache"], {}, small_table)) == 5


def test_files__keep_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrail.data.sources.ranges._OPEN", 4)
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number] * 10))
    files, before = Files(paths), len(list(Path("/proc/self/fd").iterdir()))
    for number in np.random.default_rng(0).integers(0, 20, 200):
        assert files.read(int(number), 3, 4) == bytes([number] * 4)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4
    paths[3].unlink()
    Files(paths).read(2, 0, 1)
    with pytest.raises(ImageError, match=r"3: cannot be read \(No such file or directory\)"):
        Files(paths).read(3, 0, 1)
