"""Cached lists of image files: equal to a fresh list, rebuilt when the tree changes, and shared in memory."""

import gc
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from vitrail.data.sources.index import FileIndex


@pytest.fixture
def tree(tmp_path):
    """Create three classes with 4, 0 and 3 images, one of them in a subfolder, and files that are not images."""
    root = tmp_path / "train"
    names = (
        "b/2.jpg",
        "b/10.JPEG",
        "b/ünï.png",
        "b/deep/er/1.webp",
        "c/notes.txt",
        "c/.hidden.jpg",
        "ä/0.gif",
        "ä/1.gif",
    )
    for name in (*names, "ä/2.gif"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


def settle(root, seconds=60):
    """Set the modification time of every folder to `seconds` ago."""
    then = time.time() - seconds
    for parent, _, _ in os.walk(root):
        os.utime(parent, (then, then))


CLASSES = ["b", "c", "ä"]
FILES = ["b/10.JPEG", "b/2.jpg", "b/deep/er/1.webp", "b/ünï.png", "ä/0.gif", "ä/1.gif", "ä/2.gif"]


def paths(index):
    return [index.path(number) for number in range(len(index))]


def record_listings(monkeypatch):
    calls, plain = [], FileIndex._list_files
    monkeypatch.setattr(FileIndex, "_list_files", lambda self: (calls.append(self.root), plain(self))[1])
    return calls


def test_index__same_with_and_without_cache(tree, tmp_path, monkeypatch):
    calls = record_listings(monkeypatch)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        index = FileIndex(tree, CLASSES, cache)
        assert paths(index) == FILES
        assert [index.label(number) for number in range(len(index))] == [0, 0, 0, 0, 2, 2, 2] == index.labels.tolist()
        assert len(index) == 7
    assert len(calls) == 2  # once without a cache, once to fill it
    assert isinstance(index.names, np.memmap)


@pytest.mark.parametrize("change", ["add", "remove", "add deep", "new folder", "other classes", "damage", "half"])
def test_index__rebuilt_after_a_change(tree, tmp_path, change, monkeypatch):
    FileIndex(tree, CLASSES, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    for old in folder.glob("arrays-*"):
        os.utime(old, (0, 0))  # old enough to be deleted
    classes, expected = list(CLASSES), list(FILES)
    if change == "add":
        (tree / "c" / "new.jpg").touch()
        expected.insert(4, "c/new.jpg")
    elif change == "remove":
        (tree / "b" / "2.jpg").unlink()
        expected.remove("b/2.jpg")
    elif change == "add deep":
        (tree / "b/deep/er/0.jpg").touch()
        expected.insert(2, "b/deep/er/0.jpg")
    elif change == "new folder":
        (tree / "c" / "more").mkdir()
        (tree / "c" / "more" / "1.jpg").touch()
        expected.insert(4, "c/more/1.jpg")
    elif change == "other classes":
        classes, expected = ["ä", "b"], [*FILES[4:], *FILES[:4]]
    elif change == "damage":
        (folder / "manifest.json").write_text("{")
    else:
        next(folder.glob("arrays-*/ends.npy")).write_bytes(b"")
    calls = record_listings(monkeypatch)
    assert paths(FileIndex(tree, classes, tmp_path / "cache")) == expected
    assert len(calls) == 1
    assert len(list(folder.glob("arrays-*"))) == 1


def test_index__rebuilt_if_a_folder_changed_during_the_listing(tree, tmp_path, monkeypatch):
    """A file may be added within the clock tick in which its folder was read."""
    settle(tree, seconds=0)
    FileIndex(tree, CLASSES, tmp_path / "cache")
    calls = record_listings(monkeypatch)
    FileIndex(tree, CLASSES, tmp_path / "cache")
    assert len(calls) == 1


def test_index__clock_set_back(tree, tmp_path, monkeypatch):
    """A manifest from the future is detected as outdated, because folder times are compared for equality."""
    FileIndex(tree, CLASSES, tmp_path / "cache")
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "began": content["began"] + 1e6}))
    (tree / "c" / "new.jpg").touch()
    assert len(FileIndex(tree, CLASSES, tmp_path / "cache")) == 8


def _list_and_read(tree, cache):
    for _ in range(30):
        assert paths(FileIndex(tree, CLASSES, cache)) == FILES


@pytest.mark.thorough
def test_index__many_processes_list_at_once(tree, tmp_path):
    """All processes list a recently changed tree; none deletes the arrays that another is about to open."""
    settle(tree, seconds=-60)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_list_and_read, args=(tree, tmp_path / "cache")) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6


def test_index__cache_not_writable(tree, tmp_path):
    (tmp_path / "cache").touch()
    assert paths(FileIndex(tree, CLASSES, tmp_path / "cache")) == FILES


@pytest.mark.thorough
def test_index__workers_share_memory(tmp_path):
    """A worker that reads a million paths at random uses less than 1 MiB of private memory."""
    classes = [f"{number:05d}" for number in range(100)]
    for name in classes:
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.jpg").touch()
    settle(tmp_path / "tree")
    index = FileIndex(tmp_path / "tree", classes)
    index.names = np.frombuffer(b"".join(b"n%05d_%08d.JPEG" % (n // 10_000, n) for n in range(1_000_000)), np.uint8)
    index.ends, index.counts = np.arange(1, 1_000_001) * 20, np.full(100, 10_000)
    index._keep(index._folder(tmp_path / "cache"))
    index = FileIndex(tmp_path / "tree", classes, tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    answer, sender = context.Pipe()
    worker = context.Process(target=_read_at_random, args=(index, sender))
    worker.start()
    length, kib = answer.recv()
    worker.join()
    assert length == 1_000_000
    assert kib < 1024  # the list has 27 MiB


def _read_at_random(index, sender):
    index.path(0)
    gc.collect()  # now and not later: it writes to all objects and so makes their memory private
    _private_memory()  # the first call itself allocates memory
    before = _private_memory()
    for _ in range(50_000):
        index.path(random.randrange(len(index)))
    sender.send((len(index), _private_memory() - before))


def _private_memory():
    """Return the KiB that this process has changed since the fork, without mapped files."""
    total, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_file = words[4] != "0"
        elif words[0] == "Private_Dirty:" and not is_file:
            total += int(words[1])
    return total


def test_index__hidden_and_system_folders_at_any_depth(tree):
    for name in (
        ".ipynb_checkpoints",
        "@eaDir",
        "#recycle",
        "deep/.thumbnails",
        "deep/Thumbnails",
        "deep/@eaDir/x.png",
    ):
        (tree / "b" / name).mkdir(parents=True)
        (tree / "b" / name / "9.jpg").touch()
    index = FileIndex(tree, CLASSES)
    assert paths(index) == FILES
    assert index.ignored == {"hidden": 3, "@eaDir/": 2, "#recycle/": 1, "Thumbnails/": 1, ".txt": 1}


def test_index__only_regular_files(tree):
    (tree / "b" / "folder.jpg").mkdir()
    (tree / "b" / "folder.jpg" / "inside.jpg").touch()
    (tree / "b" / "gone.jpg").symlink_to("/nowhere/x.jpg")
    (tree / "b" / "there.jpg").symlink_to("2.jpg")
    os.mkfifo(tree / "b" / "pipe.jpg")
    index = FileIndex(tree, CLASSES)
    assert set(paths(index)) == {*FILES, "b/folder.jpg/inside.jpg", "b/there.jpg"}
    assert index.ignored == {"broken link": 1, "special file": 1, "hidden": 1, ".txt": 1}


def test_index__each_folder_once(tree, tmp_path):
    """Links upwards, to another class and to the same folder again add nothing; a link to elsewhere does."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "new.jpg").touch()
    for name, target in {
        "up": "..",
        "self": ".",
        "other": "../ä",
        "a_deep": "deep",
        "x": elsewhere,
        "y": elsewhere,
    }.items():
        (tree / "b" / name).symlink_to(target)
    index = FileIndex(tree, CLASSES)
    assert paths(index) == sorted([*FILES, "b/x/new.jpg"])
    assert index.ignored["link to a folder that is listed elsewhere"] == 5


def test_index__files_that_differ_in_their_extension_have_their_own_keys(tree):
    (tree / "b" / "2.png").touch()
    (tree / "b" / "2-a.png").touch()
    keys = FileIndex(tree, CLASSES).keys()
    assert {"b/2.jpg", "b/2.png", "b/2-a", "b/10", "b/deep/er/1"} <= set(keys)
    assert len(set(keys)) == len(keys)


def test_index__name_that_is_not_utf8(tree):
    Path(os.fsdecode(bytes(tree / "b") + b"/caf\xe9.jpg")).touch()
    index = FileIndex(tree, CLASSES)
    number = index.keys().index(r"b/caf\xe9")
    assert (tree / index.path(number)).is_file()


def test_index__counts_what_it_ignores_also_from_the_cache(tree, tmp_path, monkeypatch):
    (tree / "loose.png").touch()
    (tree / "b" / "photo.heic").touch()
    (tree / "b" / "README").touch()
    settle(tree)
    calls = record_listings(monkeypatch)
    expected = {"image outside of the class folders": 1, ".heic": 1, "without extension": 1, ".txt": 1, "hidden": 1}
    for _ in range(2):
        assert FileIndex(tree, CLASSES, tmp_path / "cache").ignored == expected
    assert len(calls) == 1


def test_index__another_tree_with_equal_dates(tree, tmp_path):
    """An archive unpacked in place of another keeps its dates."""
    settle(tree)
    dates = {parent: os.stat(parent).st_mtime_ns for parent, *_ in os.walk(tree)}  # noqa: PTH116
    assert "b/2.jpg" in paths(FileIndex(tree, CLASSES, tmp_path / "cache"))
    (tree / "b" / "2.jpg").rename(tree / "b" / "3.jpg")
    for parent, date in dates.items():
        os.utime(parent, ns=(date, date))
    assert "b/3.jpg" in paths(FileIndex(tree, CLASSES, tmp_path / "cache"))
