"""Checkpoints on a disk that fails: last.ckpt is the old one or the new one, and can always be loaded."""

import multiprocessing
import random
import signal
import subprocess
import time

import pytest
import torch

from assembly import assemble
from programs import metrics, run
from resuming import RANDOM_DRAWS, last_checkpoint, new_folder, start_endless, wait_until
from vitrail.checkpoints.writing import AtomicCheckpointIO, check_space
from vitrail.errors import ConfigError
from vitrail.models import create_model


def save_forever(path):
    """Overwrite one checkpoint as a training does, 8 MB each; every number in it is that of its save."""
    checkpoint_io = AtomicCheckpointIO()
    for number in range(1, 1_000_000):
        checkpoint_io.save_checkpoint({"number": number, "weights": torch.full((2_000_000,), float(number))}, path)


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_last__survives_kills_while_it_is_written(kills, tmp_path):
    """Each process is killed at a random moment after its first save."""
    context, path, draw = multiprocessing.get_context("forkserver"), tmp_path / "last.ckpt", random.Random(0)
    for _ in range(kills):
        before = modified(path)
        process = context.Process(target=save_forever, args=(path,))
        process.start()
        wait_until(lambda before=before: modified(path) != before, "save", process)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        checkpoint = torch.load(path, weights_only=True)
        assert (checkpoint["weights"] == checkpoint["number"]).all()
    checkpoint_io = AtomicCheckpointIO()
    checkpoint_io.save_checkpoint({"number": 0}, path)
    checkpoint_io.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"], "the next save removes unfinished files"


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else None


def save_with_little_room(folder):
    import resource

    checkpoint_io, path = AtomicCheckpointIO(), folder / "checkpoints" / "last.ckpt"
    checkpoint_io.save_checkpoint({"epoch": 1}, path)
    checkpoint_io.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # larger files fail, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoint_io.save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    with pytest.raises(ConfigError, match=r"last.ckpt: cannot be written \(File too large\)"):
        checkpoint_io.save_checkpoint({"epoch": 3}, path)
    (folder / "passed").touch()


def test_full_disk__one_error_and_the_old_checkpoint_stays(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=save_with_little_room, args=(tmp_path,))
    process.start()
    process.join(60)
    assert (tmp_path / "passed").exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True) == {"epoch": 1}
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_save__later_changes_of_the_weights_are_not_saved(tmp_path):
    """The training continues while a thread writes. Tensors that share memory by identity still do after loading."""
    checkpoint_io, weights = AtomicCheckpointIO(), torch.zeros(4_000_000)
    checkpoint = {"state": {"weights": weights, "tied": weights}, "list": [weights[:2], 3], "step": 1}
    checkpoint_io.save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    weights.add_(1)
    checkpoint_io.finish()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not saved["state"]["weights"].any()
    assert saved["list"][0].tolist() == [0, 0]
    assert saved["state"]["weights"].data_ptr() == saved["state"]["tied"].data_ptr()
    assert saved["step"] == 1


def test_load_and_remove__wait_for_the_save_before(tmp_path):
    """A checkpoint is complete when it is read back at once, and a removed one does not reappear."""
    checkpoint_io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    checkpoint_io.save_checkpoint({"weights": torch.full((4_000_000,), 2.0)}, path)
    assert checkpoint_io.load_checkpoint(path)["weights"].sum() == 8_000_000
    checkpoint_io.save_checkpoint({"weights": torch.full((4_000_000,), 3.0)}, path)
    checkpoint_io.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_folder__becomes_unwritable_during_a_training(image_tree, tmp_path):
    """The training stops at its next checkpoint, names it, and keeps the last one; it resumes once this is fixed."""
    process, directory = start_endless(tmp_path, image_tree)
    folder = directory / "checkpoints"
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        process.kill()
        pytest.skip("this file system has no immutable folders, or this user may not make any")
    try:
        process.join(60)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert process.exitcode == 1
    stderr = (tmp_path / "stderr.txt").read_text()
    assert f"error: {folder}/last.ckpt: cannot be written (Operation not permitted)" in stderr
    assert f"resume={directory}" in stderr
    epochs = last_checkpoint(directory)["global_step"] // 4 + 2
    result = run("train.py", f"resume={directory}", f"epochs={epochs}", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert last_checkpoint(directory)["global_step"] == 4 * epochs


def test_best__of_several_is_a_link_to_the_best(image_tree, tmp_path):
    directory = new_folder(tmp_path / "run")
    choice = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min", "epochs=6")
    more = ("callbacks.checkpoint.save_top_k=2", f"data.root={image_tree}", "data.num_workers=0", "optimizer.lr=0.1")
    trainer, module, data = assemble(directory, *RANDOM_DRAWS, *choice, *more)
    trainer.fit(module, datamodule=data)
    losses = [row["val/loss"] for row in metrics(directory)]
    best = sorted(range(6), key=losses.__getitem__)[:2]
    kept = {path.name for path in (directory / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt", *(f"best-{epoch:03d}.ckpt" for epoch in best)}
    assert (directory / "checkpoints" / "best.ckpt").readlink().name == f"best-{best[0]:03d}.ckpt"
    assert torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == best[0]


def free_bytes(monkeypatch, free):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))


@pytest.mark.parametrize(("ema", "bytes_per_parameter"), [(True, 16), (False, 12)])
def test_space__for_three_checkpoints_before_a_training(ema, bytes_per_parameter, tmp_path, monkeypatch):
    """Three checkpoints (last, best, one being written) of weights, two moments and, if enabled, EMA weights."""
    model = torch.nn.Linear(1_000, 1_000, bias=False)
    free_bytes(monkeypatch, 3 * bytes_per_parameter * 1_000_000)
    check_space(tmp_path / "not" / "there", model, ema)
    free_bytes(monkeypatch, 3 * bytes_per_parameter * 1_000_000 - 1)
    needed = f"{3e6 * bytes_per_parameter / 2**30:.2f}"
    with pytest.raises(ConfigError, match=rf"paths.logs: .* has {needed} GiB left, checkpoints need {needed}"):
        check_space(tmp_path / "not" / "there", model, ema)


def test_space__a_resumed_training_needs_room_for_one_checkpoint(tmp_path, monkeypatch):
    model = create_model("vit_nano", 10, 32)
    one = 16 * sum(parameter.numel() for parameter in model.parameters())
    (tmp_path / "last.ckpt.shards-1").mkdir()
    for name in ("best.ckpt", "last.ckpt.shards-1/00000.safetensors"):
        (tmp_path / name).write_bytes(b" " * one)
    free_bytes(monkeypatch, one)
    check_space(tmp_path, model, True)
    (tmp_path / "best.ckpt").unlink()
    with pytest.raises(ConfigError, match="GiB left, checkpoints need"):
        check_space(tmp_path, model, True)
