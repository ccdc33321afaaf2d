"""Lists of image files that are kept: the same as listed anew, made anew when the tree changes, cheap to hold."""

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
    """Three classes with 4, 0 and 3 images, one of them in a folder of its own; files that are none."""
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
    """Let every folder's last change be a while ago."""
    then = time.time() - seconds
    for parent, _, _ in os.walk(root):
        os.utime(parent, (then, then))


CLASSES = ["b", "c", "ä"]
FILES = ["b/10.JPEG", "b/2.jpg", "b/deep/er/1.webp", "b/ünï.png", "ä/0.gif", "ä/1.gif", "ä/2.gif"]


def listings(monkeypatch):
    calls, plain = [], FileIndex._list
    monkeypatch.setattr(FileIndex, "_list", lambda self: (calls.append(self.root), plain(self))[1])
    return calls


def test_index__the_same_listed_and_kept(tree, tmp_path, monkeypatch):
    calls = listings(monkeypatch)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        index = FileIndex(tree, CLASSES, cache)
        assert index.paths() == FILES
        assert [index.label(number) for number in range(len(index))] == [0, 0, 0, 0, 2, 2, 2] == index.labels.tolist()
        assert len(index) == 7
    assert len(calls) == 2  # without a cache, and to fill it
    assert isinstance(index.names, np.memmap)


@pytest.mark.parametrize("change", ["add", "remove", "add deep", "new folder", "other classes", "damage", "half"])
def test_index__made_anew(tree, tmp_path, change, monkeypatch):
    FileIndex(tree, CLASSES, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    for old in folder.glob("arrays-*"):
        os.utime(old, (0, 0))  # long not used
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
    calls = listings(monkeypatch)
    assert FileIndex(tree, classes, tmp_path / "cache").paths() == expected
    assert len(calls) == 1
    assert len(list(folder.glob("arrays-*"))) == 1


def test_index__does_not_trust_a_folder_that_changed_while_it_was_listed(tree, tmp_path, monkeypatch):
    """A file may come within the tick of the clock in which its folder was read."""
    settle(tree, seconds=0)
    FileIndex(tree, CLASSES, tmp_path / "cache")
    calls = listings(monkeypatch)
    FileIndex(tree, CLASSES, tmp_path / "cache")
    assert len(calls) == 1


def test_index__clock_set_back(tree, tmp_path, monkeypatch):
    """A manifest from the future proves nothing by its time, but its folders' times are compared for equality."""
    FileIndex(tree, CLASSES, tmp_path / "cache")
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "began": content["began"] + 1e6}))
    (tree / "c" / "new.jpg").touch()
    assert len(FileIndex(tree, CLASSES, tmp_path / "cache")) == 8


def _list_and_read(tree, cache):
    for _ in range(30):
        assert FileIndex(tree, CLASSES, cache).paths() == FILES


def test_index__many_processes_list_at_once(tree, tmp_path):
    """A tree that has just changed is listed anew by all: none takes away what another one is about to open."""
    settle(tree, seconds=-60)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_list_and_read, args=(tree, tmp_path / "cache")) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6


def test_index__no_place_to_keep_it(tree, tmp_path):
    (tmp_path / "cache").touch()
    assert FileIndex(tree, CLASSES, tmp_path / "cache").paths() == FILES


def test_index__a_worker_holds_no_copy(tmp_path):
    """A million files: each process that reads at random maps them, and owns no more than a few MB of its own."""
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
    assert kib < 1024  # of 27 MiB


def _read_at_random(index, sender):
    index.path(0)
    gc.collect()  # which writes to every object that it looks at, and would do so in between
    _own_memory()  # which takes memory itself
    before = _own_memory()
    for _ in range(50_000):
        index.path(random.randrange(len(index)))
    sender.send((len(index), _own_memory() - before))


def _own_memory():
    """KiB that this process has changed since it was forked, and that are no file's."""
    total, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_file = words[4] != "0"
        elif words[0] == "Private_Dirty:" and not is_file:
            total += int(words[1])
    return total
