"""Killed at any moment and resumed, a training gives the weights of one that nothing happened to."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from assembly import assemble
from programs import error_of, metrics, run, run_directories, run_ranks, start, start_ranks, train
from vitrail.checkpoints import writing
from vitrail.checkpoints.writing import AtomicCheckpointIO, check_space
from vitrail.errors import ConfigError, TrainingError
from vitrail.models import create_model
from vitrail.runs import preemption
from vitrail.runs.directory import RunDirectory
from vitrail.runs.loggers import MetricsCSV
from vitrail.runs.preemption import Preemption, Stopped, lost_process

# Everything that draws or remembers: augmentation, mixing, dropout, drop path, average, accumulation, clipping.
LIVELY = (
    *("trainer=cpu", "model=deit_nano", "model.drop_path_rate=0.2", "model.drop_rate=0.1", "augment=deit"),
    *("data=imagefolder", "data.image_size=32", "data.batch_size=2", "model.patch_size=8", "epochs=3"),
    *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1", "callbacks.ema.decay=0.9"),
    *("schedule.warmup_epochs=1", "callbacks.model_summary=null", "callbacks.progress=null"),
)


STATE = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


def weights(directory):
    """Everything that the last checkpoint knows: raw and averaged weights, moments, counters."""
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path}: {(one - other).abs().max()}"
    else:
        assert one == other or one is other, f"{path}: {one} and {other}"


def kill_after(process, logs, saves, signum=signal.SIGKILL):
    """Wait for `saves` checkpoints, then send the signal; the run directory."""
    seen, deadline = set(), time.monotonic() + 120
    while len(seen) < saves and time.monotonic() < deadline and process.exitcode is None:
        for path in logs.glob("train/runs/*/checkpoints/last.ckpt"):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.001)
    assert len(seen) == saves, (logs / "stderr.txt").read_text()
    os.kill(process.pid, signum)
    process.join(60)
    (directory,) = run_directories(logs)
    return directory


@pytest.fixture
def folder(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def fit(folder, root, ckpt=None, keep=None):
    """Train in this process; `keep` gets a copy of each last.ckpt. The last one."""
    minutes = "null" if keep is None else "0"
    options = (f"callbacks.preemption.minutes={minutes}", f"data.root={root}", "data.num_workers=0")
    trainer, module, data = assemble(folder, *LIVELY, *options)
    if keep is not None:
        copy_every_save(trainer.strategy.checkpoint_io, keep)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return weights(folder)


def copy_every_save(writer, keep):
    save = writer.save_checkpoint

    def copying(checkpoint, path, storage_options=None):
        save(checkpoint, path)
        writer.finish()
        if Path(path).name == "last.ckpt":
            shutil.copy(path, keep / f"{len(list(keep.iterdir())) + 1:02d}.ckpt")

    writer.save_checkpoint = copying


def test_every_checkpoint__gives_the_same_weights(image_tree, folder):
    """After each of the 4 steps of 3 epochs; the last of an epoch is saved after its validation."""
    keep = folder("kept")
    expected = fit(folder("whole"), image_tree, keep=keep)
    checkpoints = sorted(keep.iterdir())
    assert [torch.load(path, weights_only=True)["global_step"] for path in checkpoints] == list(range(1, 13))
    for path in checkpoints[:-1]:
        found = fit(folder(path.stem), image_tree, ckpt=path)
        for part in STATE:
            assert_same(found[part], expected[part], f"{path.stem}: {part}")


def test_killed_twice__bit_for_bit_as_if_not(image_tree, folder):
    """With two loader workers; within the first epoch and within a later one, by SIGKILL."""
    arguments = (*LIVELY, f"data.root={image_tree}", "data.num_workers=2", "callbacks.preemption.minutes=0")
    expected = weights(train(*arguments, logs=folder("whole")))
    logs = folder("killed")
    directory = kill_after(start("train.py", *arguments, logs=logs), logs, saves=2)
    assert 0 < weights(directory)["global_step"] < 4
    assert kill_after(start("train.py", f"resume={directory}", logs=logs), logs, saves=5) == directory
    assert 4 < weights(directory)["global_step"] < 12
    result = run("train.py", f"resume={directory}", logs=logs)
    assert result.returncode == 0, result.stderr
    for part in STATE:
        assert_same(weights(directory)[part], expected[part], part)
    assert [row["epoch"] for row in metrics(directory)] == [0, 1, 2]
    assert all("train/lr" in row and "val/top1" in row for row in metrics(directory)[1:])


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop__saves_and_says_how_to_go_on(signum, image_tree, folder):
    """The status is 128 + the number of the signal."""
    logs = folder("asked")
    arguments = (*LIVELY, f"data.root={image_tree}", "data.num_workers=1", "callbacks.preemption.minutes=0")
    process = start("train.py", *arguments, logs=logs, COLUMNS="400")
    directory = kill_after(process, logs, saves=2, signum=signum)
    assert process.exitcode == 128 + signum
    assert f"resume={directory} goes on" in (logs / "stdout.txt").read_text()
    assert "Traceback" not in (logs / "stderr.txt").read_text()
    assert 2 <= weights(directory)["global_step"] < 12


def test_two_processes__one_is_asked_both_save_and_go_on(image_tree, folder):
    """SIGTERM to the second process only; resumed, the weights are those of an uninterrupted run to 1e-6."""
    arguments = (*LIVELY, "trainer=ddp_cpu_2", f"data.root={image_tree}", "data.num_workers=1")

    def finish(*options, logs):
        for result in run_ranks("train.py", *options, logs=logs):
            assert result.returncode == 0, result.stderr
        return weights(run_directories(logs)[0])

    expected = finish(*arguments, logs=folder("whole"))
    assert expected["global_step"] == 6
    logs = folder("asked")
    processes = start_ranks("train.py", *arguments, "callbacks.preemption.minutes=0", logs=logs)
    deadline = time.monotonic() + 120
    while not list(logs.glob("train/runs/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2, (logs / "stderr0.txt").read_text()
    (directory,) = run_directories(logs)
    assert weights(directory)["global_step"] < 6
    resumed = finish(f"resume={directory}", logs=logs)
    for key, value in resumed["current_model_state"].items():
        torch.testing.assert_close(value, expected["current_model_state"][key], rtol=0, atol=1e-6)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environ(pid):
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def save_for_ever(path):
    """What a training does to last.ckpt: 8 MB whose numbers all say which save they are of."""
    writer = AtomicCheckpointIO()
    for number in range(1, 1_000_000):
        writer.save_checkpoint({"number": number, "weights": torch.full((2_000_000,), float(number))}, path)


def kill_while_saving(path, kills):
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    random.seed(0)
    numbers = []
    for _ in range(kills):
        process = context.Process(target=save_for_ever, args=(path,))
        process.start()
        while not path.is_file():
            time.sleep(0.001)
        time.sleep(random.uniform(0.1, 0.4))
        process.kill()
        process.join()
        checkpoint = torch.load(path, weights_only=True)
        assert (checkpoint["weights"] == checkpoint["number"]).all()
        numbers.append(checkpoint["number"])
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"number": 0}, path)
    writer.finish()
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing unfinished is left
    return numbers


def test_last__survives_10_kills_while_it_is_written(tmp_path):
    assert max(kill_while_saving(tmp_path / "last.ckpt", 10)) > 1


@pytest.mark.slow
def test_last__survives_50_kills_while_it_is_written(tmp_path):
    assert max(kill_while_saving(tmp_path / "last.ckpt", 50)) > 1


def save_with_little_room(folder):
    import resource

    writer, path = AtomicCheckpointIO(), folder / "checkpoints" / "last.ckpt"
    writer.save_checkpoint({"epoch": 1}, path)
    writer.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # files end here, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer.save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    with pytest.raises(ConfigError, match=r"last.ckpt: cannot be written \(File too large\); the last good checkpoint"):
        writer.save_checkpoint({"epoch": 3}, path)
    (folder / "passed").touch()


def test_full_disk__one_sentence_and_the_old_checkpoint_stays(tmp_path):
    import multiprocessing

    process = multiprocessing.get_context("forkserver").Process(target=save_with_little_room, args=(tmp_path,))
    process.start()
    process.join(60)
    assert (tmp_path / "passed").exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True) == {"epoch": 1}
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_saving__what_changes_meanwhile_is_not_saved(tmp_path):
    """The training goes on while a thread writes; a tensor that is there twice stays one."""
    writer, weights = AtomicCheckpointIO(), torch.zeros(4_000_000)
    checkpoint = {"state": {"weights": weights, "tied": weights}, "list": [weights[:2], 3], "step": 1}
    writer.save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    weights.add_(1)
    writer.finish()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not saved["state"]["weights"].any()
    assert saved["list"][0].tolist() == [0, 0]
    assert saved["state"]["weights"].data_ptr() == saved["state"]["tied"].data_ptr()
    assert saved["step"] == 1


def test_log_folder__becomes_unwritable(image_tree, tmp_path):
    """The training stops at the next checkpoint, says where, and the last one stays; made writable, it goes on."""
    process, directory = running(tmp_path, image_tree)
    folder = directory / "checkpoints"
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        process.kill()
        pytest.skip("this file system has no immutable folders, or this user may not make any")
    try:
        process.join(60)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert process.exitcode == 1
    said = (tmp_path / "stderr.txt").read_text()
    assert f"error: {folder}/last.ckpt: cannot be written (Operation not permitted); the last good checkpoint" in said
    step = weights(directory)["global_step"]
    result = run("train.py", f"resume={directory}", f"epochs={step // 4 + 2}", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert weights(directory)["global_step"] == 4 * (step // 4 + 2)


def test_metrics__cannot_be_written_for_a_while(tmp_path, caplog):
    log = MetricsCSV(tmp_path / "run" / "metrics.csv")
    log.log_metrics({"epoch": 0, "val/top1": 1.0}, 3)
    for _ in range(2):
        log.save()
    assert caplog.text.count("metrics.csv: cannot be written (No such file or directory)") == 1
    with pytest.raises(ConfigError, match="cannot be written"):
        log.finalize("success")
    (tmp_path / "run").mkdir()
    log.save()
    assert metrics(tmp_path / "run") == [{"epoch": 0, "step": 3, "val/top1": 1}]


def test_clock__may_jump(image_tree, folder, monkeypatch):
    """Back and forth by days, while training and between two halves of one: the same weights."""
    expected = fit(folder("whole"), image_tree, keep=folder("kept"))
    start, plain = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: plain() + (-1) ** next(start) * 1e6)
    found = fit(folder("jumping"), image_tree, ckpt=folder("none").parent / "kept" / "05.ckpt")
    for part in STATE:
        assert_same(found[part], expected[part], part)


@pytest.mark.slow  # the server that fails is in tests/run/test_loggers.py
def test_wandb__its_process_is_killed(image_tree, tmp_path):
    """The training says so and goes on to its end."""
    options = (
        "logger=wandb",
        "epochs=30",
        "data.num_workers=0",
        f"data.root={image_tree}",
        "callbacks.label_maps=null",
    )
    process = start("train.py", *LIVELY, *options, logs=tmp_path, COLUMNS="400", WANDB_MODE="offline")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("train/runs/*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed = [pid for pid in children(process.pid) if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    process.join(120)
    assert killed
    assert process.exitcode == 0, (tmp_path / "stderr.txt").read_text()
    said = (tmp_path / "stdout.txt").read_text() + (tmp_path / "stderr.txt").read_text()
    assert said.count("the run goes on without it, metrics.csv has everything") <= 1
    assert len(metrics(run_directories(tmp_path)[0])) == 30


def test_space__is_checked_before_the_training(tmp_path, monkeypatch):
    model = create_model("vit_nano", 10, 32)
    check_space(tmp_path / "not" / "there", model, averaged=True)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"paths.logs: .* has 0.00 GiB left, checkpoints need 0.01; make room"):
        check_space(tmp_path, model, averaged=True)


def test_space__of_the_checkpoints_that_are_there(tmp_path, monkeypatch):
    """A training that is resumed needs room for the next one only."""
    model = create_model("vit_nano", 10, 32)
    one = 16 * sum(parameter.numel() for parameter in model.parameters())
    (tmp_path / "last.ckpt.shards-1").mkdir()
    for name in ("best.ckpt", "last.ckpt.shards-1/00000.safetensors"):
        (tmp_path / name).write_bytes(b" " * one)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": one}))
    check_space(tmp_path, model, averaged=True)
    (tmp_path / "best.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"has 0.00 GiB left, checkpoints need"):
        check_space(tmp_path, model, averaged=True)


def test_unwritable_folder__is_named(tmp_path):
    (tmp_path / "train").write_text("in the way")
    assert "train" in error_of(run("train.py", "trainer=cpu", logs=tmp_path))


def running(logs, root, *arguments):
    """A training that goes on until it is killed; the process and the run directory, once there is a checkpoint."""
    endless = ("epochs=1000", "callbacks.preemption.minutes=0", "data.num_workers=1", f"data.root={root}")
    process = start("train.py", *LIVELY, *endless, *arguments, logs=logs, COLUMNS="400")
    deadline = time.monotonic() + 120
    while not list(logs.glob("train/runs/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process, run_directories(logs)[0]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_is_killed__the_others_end_and_say_so(rank, image_tree, tmp_path):
    process, directory = running(tmp_path, image_tree, "trainer=ddp_cpu_2")
    (second,) = (pid for pid in children(process.pid) if "LOCAL_RANK=1" in environ(pid))
    killed = time.monotonic()
    os.kill([process.pid, second][rank], signal.SIGKILL)
    process.join(60)
    while Path(f"/proc/{second}").exists() and state(second) != "Z" and time.monotonic() < killed + 60:
        time.sleep(0.05)
    assert time.monotonic() < killed + 60
    said = (tmp_path / "stdout.txt").read_text() + (tmp_path / "stderr.txt").read_text()
    assert "process" in said
    assert f"resume={directory} goes on from the last checkpoint" in said
    assert weights(directory)["global_step"] >= 1


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_loader_process_is_killed__and_named(image_tree, tmp_path):
    """Before, a second training is kept out of the directory; after, one finds it free."""
    process, directory = running(tmp_path, image_tree)
    second = run("train.py", f"resume={directory}", logs=tmp_path)
    assert f"error: {directory}: another process is training there; end it first" in error_of(second)
    assert process.is_alive()
    os.kill(children(process.pid)[0], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    said = (tmp_path / "stderr.txt").read_text()
    assert "data.num_workers: a loader process was killed" in said
    assert f"resume={directory} goes on" in said
    RunDirectory(directory).claim(patience=0)


def test_lost_process__only_what_means_that(tmp_path):
    def meaning(text, kind=RuntimeError):
        told = lost_process(kind(text), tmp_path / "nccl-run")
        return told and str(told).split(":")[0].split(" (")[0]

    assert meaning("DataLoader worker (pid 7) is killed by signal: Killed.") == "data.num_workers"
    assert meaning("DataLoader worker (pid(s) 7, 8) exited unexpectedly") == "data.num_workers"
    assert meaning("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...") is None
    assert (
        meaning("[gloo/transport/tcp/pair.cc] Connection closed by peer") == "another process of this training is gone"
    )
    assert meaning(f"a loss of nan; kept in {tmp_path}/nccl-run/bad_step.pt", TrainingError) is None


def test_images_vanish__and_are_named_or_left_out(image_tree, folder):
    logs = folder("stopping")
    process, _ = running(logs, image_tree)
    for path in (image_tree / "train" / "pagoda").iterdir():
        path.unlink()
    process.join(60)
    assert process.exitcode == 1
    assert "not a readable image (no such file)" in (logs / "stderr.txt").read_text()
    skipping, directory = running(
        folder("skipping"), image_tree, "data.on_corrupt=skip", "data.train_dir=val", "data.val_dir=val"
    )
    (image_tree / "val" / "pagoda" / "pagoda_0.jpg").unlink()
    step, deadline = weights(directory)["global_step"], time.monotonic() + 60
    while not (directory / "skipped.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    assert skipping.is_alive()
    assert weights(directory)["global_step"] > step
    skipping.kill()
    skipping.join()
    assert "pagoda_0.jpg: not a readable image (no such file)" in (directory / "skipped.txt").read_text()


def test_best__of_several_is_what_best_says(image_tree, folder):
    directory = folder("run")
    choice = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min", "epochs=6")
    more = ("callbacks.checkpoint.save_top_k=2", f"data.root={image_tree}", "data.num_workers=0", "optimizer.lr=0.1")
    trainer, module, data = assemble(directory, *LIVELY, *choice, *more)
    trainer.fit(module, datamodule=data)
    losses = [row["val/loss"] for row in metrics(directory)]
    best = sorted(range(6), key=losses.__getitem__)[:2]
    kept = {path.name for path in (directory / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt", *(f"best-{epoch:03d}.ckpt" for epoch in best)}
    assert torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == best[0]


def test_stop__only_when_all_is_written(image_tree, folder, monkeypatch):
    """Who started the processes may kill all when the first of them has ended."""
    write = writing._write

    def slowly(checkpoint, target):
        time.sleep(0.5)
        write(checkpoint, target)

    seen = []

    class Noted(Stopped):
        def __init__(self, signum):
            super().__init__(signum)
            seen.append(weights(directory)["global_step"])

    monkeypatch.setattr(writing, "_write", slowly)
    monkeypatch.setattr(preemption, "Stopped", Noted)
    directory = folder("run")
    trainer, module, data = assemble(directory, *LIVELY, f"data.root={image_tree}", "data.num_workers=0")
    (keep,) = (callback for callback in trainer.callbacks if isinstance(callback, Preemption))
    keep._asked = signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        trainer.fit(module, datamodule=data)
    assert seen == [1]
    assert stopped.value.status(trainer) == 143
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert stopped.value.status(trainer) == 143
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert stopped.value.status(trainer) == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for rank, outside, status in ((0, False, 143), (1, False, 0), (1, True, 143)):
        cluster = SimpleNamespace(creates_processes_externally=outside)
        helper = SimpleNamespace(local_rank=rank, strategy=SimpleNamespace(cluster_environment=cluster))
        assert stopped.value.status(helper) == status


def test_interrupt__the_second_one_ends_at_once(monkeypatch, tmp_path, capfd):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    keep = Preemption(tmp_path / "last.ckpt")
    keep._ask(signal.SIGINT, None)
    assert statuses == []
    assert "SIGINT: saving after this step, again: at once" in capfd.readouterr().err
    keep._ask(signal.SIGINT, None)
    assert statuses == [130]
