"""src/pack.py in real processes, one of which is killed; training and evaluation on packs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

import layouts
from packing import pack
from programs import PROJECT, QUICK, environment, error_of, metrics, run, run_directories, start, train
from vitrail.data.sources import Packed

SMALL = ("model=vit_nano", "data.image_size=32", "data.batch_size=4", "data.num_workers=0")


def kill_after(out, count, arguments, logs):
    """Start pack.py, and kill it once it has written `count` data files; return how many are written.

    Only its main process is killed; those that it has started must end with it.
    """
    if "processes=1" in arguments:
        process = start("pack.py", *arguments, f"out={out}", logs=logs)
    else:  # a warm process cannot start others
        command = [sys.executable, str(PROJECT / "src" / "pack.py"), *arguments, f"out={out}"]
        process = subprocess.Popen(command, env=environment(logs), start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*/[0-9]*.npz"))) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    started = ["pgrep", "-g", str(process.pid)]
    while subprocess.run(started, stdout=subprocess.DEVNULL, check=False).returncode == 0:
        process.poll() if isinstance(process, subprocess.Popen) else process.join(0)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return len(list(out.glob("*/[0-9]*.npz")))


def larger(image_tree):
    """Return an image tree of 200 training images that take a while to pack."""
    for path in list(image_tree.glob("train/*/*.jpg")):
        for number in range(12):
            (path.parent / f"{path.stem}-{number}.jpg").hardlink_to(path)
    return image_tree


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pack__resumes_after_a_kill(processes, image_tree, tmp_path):
    root, out = larger(image_tree), tmp_path / "killed"
    arguments = (f"data.root={root}", "size=200", "format=raw", "shard_images=4", f"processes={processes}")
    done = kill_after(out, 5, arguments, tmp_path)
    assert 5 <= done < 54
    finished = {path: path.with_suffix(".bin").stat() for path in out.glob("*/[0-9]*.npz")}
    again = run("pack.py", *arguments, f"out={out}", logs=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"into {54 - done} of 54 files" in " ".join(again.stdout.split())
    assert "208 images" in again.stdout
    assert all(path.with_suffix(".bin").stat() == state for path, state in finished.items())
    whole = pack(tmp_path / "whole", *arguments[:4])
    assert Packed(str(out)).manifest == whole.manifest
    assert list(Packed(str(out)).damaged()) == []
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pack__errors_are_one_sentence(processes, image_tree, tmp_path):
    (image_tree / "train" / "flower" / "flower_3.jpg").write_bytes(b"no picture")
    arguments = (f"data.root={image_tree}", f"out={tmp_path / 'pack'}", "shard_images=8")
    failed = error_of(run("pack.py", *arguments, f"processes={processes}", logs=tmp_path))
    assert "flower_3.jpg: not a readable image" in failed
    assert error_of(run("pack.py", f"out={tmp_path / 'x'}", logs=tmp_path)).startswith("error: data.root: not set")


def test_pack__two_at_once_are_refused(image_tree, tmp_path):
    import fcntl

    (tmp_path / "pack").mkdir()
    with (tmp_path / "pack" / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        failed = error_of(run("pack.py", f"data.root={image_tree}", f"out={tmp_path / 'pack'}", logs=tmp_path))
    assert "another process is packing there" in failed


def test_train__on_a_pack_of_original_files_equals_training_on_the_files(image_tree, tmp_path):
    pack(tmp_path / "pack", f"data.root={image_tree}", "shard_images=5")
    arguments = (*QUICK, *SMALL, "data.num_workers=2")
    one = train(*arguments, "data=imagefolder", f"data.root={image_tree}", logs=tmp_path)
    two = train(*arguments, "data=packed", f"data.root={tmp_path / 'pack'}", logs=tmp_path)
    before, after = metrics(one)[0], metrics(two)[0]
    same = {key for key in before if not key.startswith(("speed/", "memory/"))}
    assert {key: before[key] for key in same} == {key: after[key] for key in same}
    assert "resized" not in (two / "train.log").read_text()


def test_train__states_what_a_pack_stores_and_evaluates_on_packs(image_tree, tmp_path):
    pack(tmp_path / "small", f"data.root={image_tree}", "size=64", "format=raw")
    data = ("data=packed", f"data.root={tmp_path / 'small'}")
    directory = train(*QUICK, *SMALL, *data, logs=tmp_path)
    assert "data: shorter sides above 64 pixels were resized to 64" in " ".join(
        (directory / "train.log").read_text().split()
    )
    for arguments in ((), (*data, "data.num_workers=0")):
        done = run("eval.py", f"ckpt={directory}", *arguments, logs=tmp_path)
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((path / "results.json").read_text()) for path in run_directories(tmp_path, "eval"))
    assert first == second
    for split in ("train", "val"):
        (image_tree / split / "pagoda").rename(image_tree / split / "temple")
    pack(tmp_path / "other", f"data.root={image_tree}")
    failed = run("eval.py", f"ckpt={directory}", "data=packed", f"data.root={tmp_path / 'other'}", logs=tmp_path)
    assert "1 of its 2 classes are not among the checkpoint's 2 classes; the first is temple" in error_of(failed)
    failed = run("train.py", f"resume={directory}", "epochs=2", f"+data.root={tmp_path / 'other'}", logs=tmp_path)
    assert "temple" in error_of(failed)
    os.truncate(tmp_path / "small" / "val" / "00000.bin", 50)
    failed = run("eval.py", f"ckpt={directory}", logs=tmp_path)
    assert "val/00000.bin has 50 bytes instead of" in error_of(failed)


@pytest.mark.thorough
def test_eval__real_labels_on_a_pack(tmp_path):
    root = layouts.write_folders(tmp_path / "imagenet")
    pack(tmp_path / "pack", "data=imagenet_real", f"data.root={root}")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    model = ("model=timm", "model.name=test_vit", f"ckpt={tmp_path / 'weights.pth'}", "+augment.crop_pct=1.0")
    common = (*model, "data.image_size=160", "data.num_workers=0", "data.batch_size=100")
    for data in (("data=imagenet_real", f"data.root={root}"), ("data=packed", f"data.root={tmp_path / 'pack'}")):
        done = run("eval.py", *common, *data, logs=tmp_path)
        assert done.returncode == 0, done.stderr
    results = [json.loads((path / "results.json").read_text())["raw"] for path in run_directories(tmp_path, "eval")]
    assert results[0] == results[1]
    assert 900 < results[0]["images"] < 1000  # the others show none of the classes
