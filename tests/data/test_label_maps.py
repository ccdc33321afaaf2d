"""The label-map store and the published format."""

import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

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


def test_store__gives_back_what_was_written(store):
    opened, scores, classes = store
    assert len(opened) == 5
    assert (opened.top_k, opened.grid, opened.num_classes, opened.about) == (2, (3, 4), 10, {"annotator": "me"})
    for key, index in (("c/0", 0), ("c/4", -1), (2, 2)):
        got_scores, got_classes = opened[key]
        np.testing.assert_array_equal(got_scores, scores[index])
        np.testing.assert_array_equal(got_classes, classes[index])
        assert (got_scores.dtype, got_classes.dtype) == (np.float16, np.uint16)
        torch.from_numpy(got_scores).add_(1)  # the reader's own memory
    np.testing.assert_array_equal(opened[0][0], scores[0])
    assert "c/3" in opened
    assert "c/5" not in opened
    assert not list(opened.damaged_parts())
    assert not (opened.path / "done.npy").exists()


def test_store__goes_to_other_processes(store):
    opened, scores, _ = store
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened))["c/2"][0], scores[2])
    loader = torch.utils.data.DataLoader(opened, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert len(list(loader)) == 5


def test_store__many_classes_take_more_bytes(tmp_path):
    writer = LabelMapStore.create(tmp_path / "maps", 1, 1, (1, 1), 70_000)
    writer.write(0, np.zeros((1, 1, 1), np.float16), np.full((1, 1, 1), 69_999))
    _, classes = writer.finish()["0"]
    assert classes.dtype == np.int32
    assert classes.item() == 69_999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "unfinished label maps; run the same command again"),
        (lambda path: os.truncate(path / "maps.bin", 200), "maps.bin has 200 bytes instead of 480; it was cut short"),
        (lambda path: (path / "keys.npy").write_bytes(b"x"), "damaged"),
        (lambda path: (path / "manifest.json").write_text("{"), "damaged"),
        (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "written by a newer vitrail"),
    ],
)
def test_open__refuses_what_is_not_whole(store, change, message):
    path = store[0].path
    change(path)
    with pytest.raises(ConfigError, match=message):
        LabelMapStore.open(path)


def test_open__nothing_there(tmp_path):
    with pytest.raises(ConfigError, match=r"data.label_maps=.*: no label maps \(no manifest.json\)"):
        LabelMapStore.open(tmp_path)


def test_checksums__find_the_damaged_part(store):
    path = store[0].path
    with (path / "maps.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    assert list(LabelMapStore.open(path).damaged_parts()) == [(0, 4)]


def test_missing_map__is_named(store):
    with pytest.raises(KeyError, match="c/9: no label map in"):
        store[0]["c/9"]
    with pytest.raises(IndexError, match="label map 5 of 5"):
        store[0][5]


@pytest.mark.parametrize(
    ("scores", "classes", "message"),
    [
        (np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), "must both end in"),
        (np.full((2, 3, 4), 1e6), np.zeros((2, 3, 4)), "scores must be finite"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), 10), "classes 10 to 10 are not within 0 to 9"),
    ],
)
def test_write__refuses(tmp_path, scores, classes, message):
    writer = LabelMapStore.create(tmp_path / "maps", 1, 2, (3, 4), 10)
    with pytest.raises(ValueError, match=message):
        writer.write(0, scores, classes)
    with pytest.raises(ConfigError, match="1 of 1 label maps are not written yet"):
        writer.finish()


def test_create__refuses_to_overwrite_or_to_mix(store, tmp_path):
    with pytest.raises(ConfigError, match="holds finished label maps already"):
        LabelMapStore.create(store[0].path, 5, 2, (3, 4), 10)
    LabelMapStore.create(tmp_path / "other", 5, 2, (3, 4), 10)
    with pytest.raises(ConfigError, match="holds unfinished label maps of another kind"):
        LabelMapStore.create(tmp_path / "other", 5, 2, (4, 4), 10)
    with pytest.raises(ConfigError, match="the key a occurs twice"):
        LabelMapStore.create(tmp_path / "twice", 3, 2, (3, 4), 10, ["a", "b", "a"])


WRITE_SLOWLY = """
import sys, time, numpy as np
from vitrail.data.label_maps import LabelMapStore
writer = LabelMapStore.create(sys.argv[1], 200, 2, (3, 4), 10)
for i in np.flatnonzero(writer.done == 0):
    writer.write(i, np.full((2, 3, 4), i, np.float16), np.full((2, 3, 4), i % 10))
    print(i, flush=True)
    time.sleep(float(sys.argv[2]))
writer.finish()
"""


def test_killed__goes_on_without_redoing_or_losing(tmp_path):
    command = [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "maps")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    process = subprocess.Popen([*command, "0.01"], env=environment, stdout=subprocess.PIPE, text=True)
    finished = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    finished += [int(number) for number in rest]
    with pytest.raises(ConfigError, match="unfinished"):
        LabelMapStore.open(tmp_path / "maps")
    again = subprocess.run([*command, "0"], env=environment, capture_output=True, text=True, check=True)
    redone = [int(number) for number in again.stdout.split()]
    assert not set(finished) & set(redone)
    assert len(set(finished) | set(redone)) >= 199  # one may have been written and not yet reported
    opened = LabelMapStore.open(tmp_path / "maps")
    for i in range(200):
        assert (opened[str(i)][0] == i).all()
        assert (opened[i][1] == i % 10).all()


# The published format


@pytest.fixture
def official(tmp_path):
    """Six files as the official generator writes them."""
    scores, classes = random_maps(6, 5, (4, 4), 1000)
    for i in range(6):
        target = tmp_path / "label_top5" / f"n{i % 2}" / f"n{i % 2}_{i}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(np.stack((scores[i], classes[i].astype(np.float16)))), target)
    return tmp_path / "label_top5", scores, classes


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.pt")):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("pack", [lambda folder: folder, zipped])
def test_import__folder_or_zip(official, pack, tmp_path):
    folder, scores, classes = official
    store = LabelMapStore.import_official(pack(folder), tmp_path / "maps", annotator="nfnet_f6")
    assert [bytes(key).decode() for key in store.keys] == [
        "n0/n0_0",
        "n0/n0_2",
        "n0/n0_4",
        "n1/n1_1",
        "n1/n1_3",
        "n1/n1_5",
    ]
    for i in range(6):
        np.testing.assert_array_equal(store[f"n{i % 2}/n{i % 2}_{i}"][0], scores[i])
        np.testing.assert_array_equal(store[f"n{i % 2}/n{i % 2}_{i}"][1], classes[i])
    assert store.about == {"source": "official", "coverage": "center square", "annotator": "nfnet_f6"}


def test_export__is_what_was_imported(official, tmp_path):
    folder, _, _ = official
    LabelMapStore.import_official(folder, tmp_path / "maps").export_official(tmp_path / "again")
    for file in folder.rglob("*.pt"):
        again = torch.load(tmp_path / "again" / file.relative_to(folder), weights_only=True)
        torch.testing.assert_close(again, torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("tensor", "save"),
    [
        (torch.zeros(2, 5, 4, 4, dtype=torch.float16), {"_use_new_zipfile_serialization": False}),
        (torch.zeros(2, 4, 4, 5, dtype=torch.float16).permute(0, 3, 1, 2), {}),  # not contiguous
        (torch.zeros(3, 5, 4, 4, dtype=torch.float16)[1:], {}),  # a view of more
    ],
)
def test_import__unusual_files_are_read_right(official, tensor, save, tmp_path):
    folder, scores, _ = official
    tensor[0] += torch.arange(80).reshape(5, 4, 4)
    torch.save(tensor, folder / "n0" / "n0_2.pt", **save)
    store = LabelMapStore.import_official(folder, tmp_path / "maps")
    np.testing.assert_array_equal(store["n0/n0_2"][0], np.arange(80).reshape(5, 4, 4))
    np.testing.assert_array_equal(store["n0/n0_4"][0], scores[4])


class Trap:
    def __reduce__(self):
        return (os.system, ("touch sprung",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: torch.save(Trap(), file), "n0_2.pt holds no tensor"),
        (lambda file: torch.save([torch.zeros(2), Trap()], file), "n0_2.pt cannot be read safely"),
        (lambda file: torch.save(torch.zeros(2, 5, 4, 4), file), r"n0_2.pt holds torch.float32 \(2, 5, 4, 4\)"),
        (lambda file: torch.save(torch.zeros(2, 5, 3, 3).half(), file), r"n0_2.pt has shape \(5, 3, 3\), the others"),
        (lambda file: torch.save(torch.full((2, 5, 4, 4), 1.5).half(), file), "n0_2.pt holds class 1.5, not one of"),
        (lambda file: torch.save(torch.full((2, 5, 4, 4), 1000).half(), file), "n0_2.pt holds class 1000, not one of"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "n0_2.pt cannot be read safely"),
        (lambda file: file.write_bytes(b""), "n0_2.pt cannot be read safely"),
    ],
)
def test_import__refuses_and_names_the_file(official, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _, _ = official
    content(folder / "n0" / "n0_2.pt")
    with pytest.raises(ConfigError, match=message):
        LabelMapStore.import_official(folder, tmp_path / "maps")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ConfigError):
        LabelMapStore.open(tmp_path / "maps")


def test_import__damaged_zip_member_is_named(official, tmp_path):
    path = zipped(official[0])
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("label_top5/n0/n0_4.pt")
    data[info.header_offset + 30 + len(info.filename) + 400] ^= 255
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"member label_top5/n0/n0_4.pt is damaged"):
        LabelMapStore.import_official(path, tmp_path / "maps")
    path.write_bytes(data[:-100])
    with pytest.raises(ConfigError, match=r"holds no .pt files, or was cut short"):
        LabelMapStore.import_official(path, tmp_path / "more")


def test_import__paths_that_leave_the_archive(official, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.write(official[0] / "n0" / "n0_0.pt", "../../n0_0.pt")
    with pytest.raises(ConfigError, match=r"a path with '..'"):
        LabelMapStore.import_official(tmp_path / "evil.zip", tmp_path / "maps")


def test_import__nothing_there(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no .pt files"):
        LabelMapStore.import_official(tmp_path, tmp_path / "maps")
    with pytest.raises(ConfigError, match="no such folder or zip"):
        LabelMapStore.import_official(tmp_path / "x.zip", tmp_path / "maps")


def test_reading__costs_no_memory_that_grows(tmp_path):
    """100,000 records of 384 bytes are read; the process grows by less than the file."""
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
    started = time.monotonic()
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(out) < 4_000, f"grew by {out} kB in {time.monotonic() - started:.0f} s"
