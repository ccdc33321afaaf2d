"""Label-map store: write, resume, read in any process, detect damage."""

import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from programs import PROJECT
from vitrail.data.label_maps import LabelMapStore
from vitrail.errors import ConfigError


def random_maps(count, top_k=2, grid=(3, 4), num_classes=10):
    rng = np.random.default_rng(count)
    scores = rng.standard_normal((count, top_k, *grid)).astype(np.float16)
    return scores, rng.integers(0, num_classes, (count, top_k, *grid))


@pytest.fixture
def store(tmp_path):
    scores, classes = random_maps(5)
    writer = LabelMapStore.create(tmp_path / "maps", 5, 2, (3, 4), 10, [f"c/{i}" for i in range(5)], annotator="me")
    writer.write(3, scores[3:], classes[3:])
    for i in range(3):
        writer.write(i, scores[i], classes[i])
    return writer.finish(), scores, classes


def test_store__returns_the_written_maps(store):
    opened, scores, classes = store
    assert len(opened) == 5
    assert (opened.top_k, opened.grid, opened.num_classes, opened.about) == (2, (3, 4), 10, {"annotator": "me"})
    for key, index in (("c/0", 0), ("c/4", -1), (2, 2)):
        got_scores, got_classes = opened[key]
        np.testing.assert_array_equal(got_scores, scores[index])
        np.testing.assert_array_equal(got_classes, classes[index])
        assert (got_scores.dtype, got_classes.dtype) == (np.float16, np.uint16)
        torch.from_numpy(got_scores).add_(1)  # a copy, so the store does not change
    np.testing.assert_array_equal(opened[0][0], scores[0])
    assert "c/3" in opened
    assert "c/5" not in opened
    assert not list(opened.damaged_parts())
    assert not (opened.path / "done.npy").exists()


def test_store__works_in_other_processes(store):
    opened, scores, _ = store
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened))["c/2"][0], scores[2])
    loader = torch.utils.data.DataLoader(opened, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert len(list(loader)) == 5


def test_store__many_classes_use_int32(tmp_path):
    writer = LabelMapStore.create(tmp_path / "maps", 1, 1, (1, 1), 70_000)
    writer.write(0, np.zeros((1, 1, 1), np.float16), np.full((1, 1, 1), 69_999))
    _, classes = writer.finish()["0"]
    assert classes.dtype == np.int32
    assert classes.item() == 69_999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "unfinished label maps; run the same command again"),
        (lambda path: os.truncate(path / "maps.bin", 200), "maps.bin has 200 bytes instead of 480; it is truncated"),
        (lambda path: (path / "keys.npy").write_bytes(b"x"), "damaged"),
        (lambda path: (path / "manifest.json").write_text("{"), "damaged"),
        (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "written by a newer vitrail"),
    ],
)
def test_open__incomplete_store(store, change, message):
    path = store[0].path
    change(path)
    with pytest.raises(ConfigError, match=message):
        LabelMapStore.open(path)


def test_open__no_store(tmp_path):
    with pytest.raises(ConfigError, match=r"data.label_maps=.*: no label maps \(no manifest.json\)"):
        LabelMapStore.open(tmp_path)


def test_checksums__find_the_damaged_part(store):
    path = store[0].path
    with (path / "maps.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    assert list(LabelMapStore.open(path).damaged_parts()) == [(0, 4)]


def test_missing_map__error_names_the_key(store):
    with pytest.raises(KeyError, match="c/9: no label map in"):
        store[0]["c/9"]
    with pytest.raises(IndexError, match="no label map 5; there are 5"):
        store[0][5]


@pytest.mark.parametrize(
    ("scores", "classes", "message"),
    [
        (np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), "must both end in"),
        (np.full((2, 3, 4), 1e6), np.zeros((2, 3, 4)), "scores must be finite"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), 10), "classes 10 to 10 are not within 0 to 9"),
    ],
)
def test_write__invalid_arrays(tmp_path, scores, classes, message):
    writer = LabelMapStore.create(tmp_path / "maps", 1, 2, (3, 4), 10)
    with pytest.raises(ValueError, match=message):
        writer.write(0, scores, classes)
    with pytest.raises(ConfigError, match="1 of 1 label maps are not written yet"):
        writer.finish()


def test_create__existing_store_or_repeated_key(store, tmp_path):
    with pytest.raises(ConfigError, match="already contains finished label maps"):
        LabelMapStore.create(store[0].path, 5, 2, (3, 4), 10)
    LabelMapStore.create(tmp_path / "other", 5, 2, (3, 4), 10)
    with pytest.raises(ConfigError, match="contains unfinished label maps with another description"):
        LabelMapStore.create(tmp_path / "other", 5, 2, (4, 4), 10)
    with pytest.raises(ConfigError, match="the key a occurs twice"):
        LabelMapStore.create(tmp_path / "twice", 3, 2, (3, 4), 10, ["a", "b", "a"])


WRITE_SOME = """
import sys, numpy as np
from vitrail.data.label_maps import LabelMapStore
writer = LabelMapStore.create(sys.argv[1], 200, 2, (3, 4), 10)
for i in map(int, np.flatnonzero(writer.done == 0)):
    writer.write(i, np.full((2, 3, 4), i, np.float16), np.full((2, 3, 4), i % 10))
    print(i, flush=True)
    if i == int(sys.argv[2]):
        sys.stdin.read()  # until the process is killed
writer.finish()
"""


def test_killed_writer__resumes_without_repeating_or_losing_records(tmp_path):
    """Killed after 20 of 200 records; the same program then writes the other 180."""
    command = [sys.executable, "-c", WRITE_SOME, str(tmp_path / "maps")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "19"], env=environment, **pipes) as process:
        finished = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""
    assert finished == list(range(20))
    with pytest.raises(ConfigError, match="unfinished"):
        LabelMapStore.open(tmp_path / "maps")
    resumed = subprocess.run([*command, "-1"], env=environment, capture_output=True, text=True, check=True)
    assert [int(number) for number in resumed.stdout.split()] == list(range(20, 200))
    opened = LabelMapStore.open(tmp_path / "maps")
    for i in range(200):
        assert (opened[str(i)][0] == i).all()
        assert (opened[i][1] == i % 10).all()


def test_reading__memory_does_not_grow(tmp_path):
    """Reading 100,000 records of 384 bytes increases the process's memory by much less than the file's size."""
    script = (
        "import sys, random, numpy as np, resource\n"
        "from vitrail.data.label_maps import LabelMapStore\n"
        "writer = LabelMapStore.create(sys.argv[1], 100_000, 2, (6, 8), 10)\n"
        "writer.done[:] = 1\n"
        "store = writer.finish()\n"
        "store[0]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for i in range(100_000): store[i]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    command = [sys.executable, "-c", script, str(tmp_path / "maps")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(out) < 4_000, f"memory grew by {out} kB"
