"""Signals, the stop file, and processes that die: the training saves, prints how to resume, and exits."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from assembly import assemble
from programs import error_of, run, run_directories
from resuming import (
    RANDOM_DRAWS,
    child_processes,
    end_with,
    finish_ranks,
    last_checkpoint,
    new_folder,
    start_endless,
    start_held,
    wait_until,
)
from vitrail.checkpoints import writing
from vitrail.errors import TrainingError
from vitrail.runs import preemption
from vitrail.runs.directory import RunDirectory
from vitrail.runs.preemption import Preemption, Stopped, lost_process


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT])
def test_signal__saves_after_the_next_step_and_prints_the_resume_command(signum, image_tree, tmp_path):
    """A signal after step 2 of 12: the training ends after step 3, with exit status 128 + signal number."""
    arguments = (*RANDOM_DRAWS, f"data.root={image_tree}", "data.num_workers=1")
    (process,) = start_held(*arguments, logs=tmp_path, step=2)
    assert end_with(process, signum) == 128 + signum
    (directory,) = run_directories(tmp_path)
    assert f"resume={directory}" in (tmp_path / "stdout.txt").read_text()
    stderr = (tmp_path / "stderr.txt").read_text()
    assert signal.Signals(signum).name in stderr
    assert "Traceback" not in stderr
    assert last_checkpoint(directory)["global_step"] == 3


def test_signal__to_one_of_two_processes_stops_both(image_tree, tmp_path):
    """SIGTERM to the second process only; resumed, the weights agree to 1e-6 with those of an uninterrupted run."""
    arguments = (*RANDOM_DRAWS, "trainer=ddp_cpu_2", f"data.root={image_tree}", "data.num_workers=1")
    arguments += ("trainer.accumulate_grad_batches=1",)  # 4 optimiser steps per epoch

    expected = finish_ranks(*arguments, logs=new_folder(tmp_path / "whole"))
    assert expected["global_step"] == 12
    logs = new_folder(tmp_path / "asked")
    processes = start_held(*arguments, logs=logs, step=2, ranks=2, rank=1)
    end_with(processes[1], signal.SIGTERM)
    processes[0].join(60)
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2, (logs / "stderr0.txt").read_text()
    (directory,) = run_directories(logs)
    assert last_checkpoint(directory)["global_step"] == 3
    resumed = finish_ranks(f"resume={directory}", logs=logs)
    for key, value in resumed["current_model_state"].items():
        torch.testing.assert_close(value, expected["current_model_state"][key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("batches_of_others", "stopped_after"), [([4], 4), ([9], 9), ([4, 9], 4)])
def test_late_answer__stops_all_processes_after_the_same_batch(batches_of_others, stopped_after, tmp_path, monkeypatch):
    """On GPUs the answer to a question is read one batch later; here two processes ask at every fourth batch."""
    questions = {}

    class LatePoll:
        late = True

        def __init__(self, rank):
            self.rank, self.asked, self.pending = rank, 0, False

        def ask(self, numbers):
            questions.setdefault(self.asked, {})[self.rank] = numbers
            self.asked, self.pending = self.asked + 1, True

        def answer(self):
            self.pending = False
            both = questions[self.asked - 1].values()
            assert len(both) == 2, "read before the other process has asked"
            return [max(numbers) for numbers in zip(*both, strict=True)]

    monkeypatch.setattr(preemption, "is_last_batch", lambda _: False)
    monkeypatch.setattr(preemption, "is_accumulating", lambda trainer: trainer.batch % 2 == 0)
    monkeypatch.setattr(Preemption, "_save", lambda _, trainer: saved.append(trainer.batch))
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(preemption, "time", clock)
    now, saved, ended = [0.0], [], []
    strategy = SimpleNamespace(checkpoint_io=SimpleNamespace(teardown=lambda: None), barrier=lambda _: None)
    ranks = [Preemption(tmp_path / "last.ckpt") for _ in range(2)]
    for rank, callback in enumerate(ranks):
        callback._poll = LatePoll(rank)
    for batch in range(1, 40):
        now[0] += 0.5
        if batch in batches_of_others:
            ranks[batches_of_others.index(batch) % 2]._asked = signal.SIGTERM
        for callback in ranks:
            trainer = SimpleNamespace(world_size=2, batch=batch, is_global_zero=callback is ranks[0], strategy=strategy)
            try:
                callback.on_train_batch_end(trainer, None, None, None, batch)
            except Stopped:
                ended.append(batch)
        if ended:
            break
    assert saved == ended
    assert len(set(ended)) == 1
    assert len(ended) == 2
    assert batch - stopped_after <= 8


def test_interrupt__the_second_one_exits_at_once(monkeypatch, tmp_path, capfd):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    callback = Preemption(tmp_path / "last.ckpt")
    callback._ask(signal.SIGINT, None)
    assert statuses == []
    assert "SIGINT" in capfd.readouterr().err
    callback._ask(signal.SIGINT, None)
    assert statuses == [130]


def test_stop_file__ends_the_training_after_the_epoch(image_tree, tmp_path):
    """A stop file left by an earlier run is removed at the start; one created in epoch 1 stops after epoch 1."""
    trainer, module, data = assemble(
        tmp_path, *RANDOM_DRAWS, f"data.root={image_tree}", "data.num_workers=0", "callbacks.preemption.minutes=null"
    )
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, Preemption))
    callback.stop.touch()
    ended = []

    def on_train_epoch_start(trainer, module):
        ended.append(trainer.current_epoch)
        if trainer.current_epoch == 1:
            callback.stop.touch()

    callback.on_train_epoch_start = on_train_epoch_start
    with pytest.raises(Stopped) as stopped:
        trainer.fit(module, datamodule=data)
    assert ended == [0, 1]
    assert stopped.value.signum == signal.SIGTERM
    assert last_checkpoint(tmp_path)["global_step"] == 8


def test_stopped__only_after_the_checkpoint_is_written(image_tree, tmp_path, monkeypatch):
    """The launcher may kill all processes as soon as one has ended; so that one must not end during the write."""
    written, seen = [], []
    write = writing._write

    def slow_write(checkpoint, target):
        time.sleep(0.2)
        write(checkpoint, target)
        written.append(checkpoint["global_step"])

    class Recorded(Stopped):
        def __init__(self, signum):
            super().__init__(signum)
            seen.append(list(written))

    monkeypatch.setattr(writing, "_write", slow_write)
    monkeypatch.setattr(preemption, "Stopped", Recorded)
    trainer, module, data = assemble(tmp_path, *RANDOM_DRAWS, f"data.root={image_tree}", "data.num_workers=0")
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, Preemption))
    callback._asked = signal.SIGTERM
    with pytest.raises(Stopped):
        trainer.fit(module, datamodule=data)
    assert seen == [[1]]
    assert last_checkpoint(tmp_path)["global_step"] == 1


def test_status__is_0_where_a_launcher_would_take_it_for_a_failure(monkeypatch):
    """128 + 15 for SIGTERM, but 0 under torchrun with restarts, and in processes that Lightning started itself."""

    def status(rank=0, launched_by_others=False):
        cluster = SimpleNamespace(creates_processes_externally=launched_by_others)
        trainer = SimpleNamespace(local_rank=rank, strategy=SimpleNamespace(cluster_environment=cluster))
        return Stopped(signal.SIGTERM).status(trainer)

    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    assert [status(0, False), status(1, False), status(1, True)] == [143, 0, 143]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert status(1, True) == 143
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert status(1, True) == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert status(1, True) == 143


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def has_ended(pid):
    """Whether a process is gone, or a zombie that its parent did not wait for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_process__the_others_end_and_print_the_resume_command(rank, image_tree, tmp_path):
    process, directory = start_endless(tmp_path, image_tree, "trainer=ddp_cpu_2")
    (second,) = (pid for pid in child_processes(process.pid) if "LOCAL_RANK=1" in environment_of(pid))
    os.kill([process.pid, second][rank], signal.SIGKILL)
    process.join(120)
    wait_until(lambda: has_ended(second), "end of the second process")
    assert process.exitcode not in (None, 0)
    printed = (tmp_path / "stdout.txt").read_text() + (tmp_path / "stderr.txt").read_text()
    assert "process" in printed
    assert f"resume={directory}" in printed
    assert last_checkpoint(directory)["global_step"] >= 1


def test_killed_loader_worker__is_named(image_tree, tmp_path):
    """While the training runs, a second one in its directory is refused; once it has ended, the directory is free."""
    process, directory = start_endless(tmp_path, image_tree)
    second = run("train.py", f"resume={directory}", logs=tmp_path)
    assert f"error: {directory}: another" in error_of(second)
    assert process.is_alive()
    os.kill(child_processes(process.pid)[0], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    stderr = (tmp_path / "stderr.txt").read_text()
    assert "error: data.num_workers: " in stderr
    assert f"resume={directory}" in stderr
    RunDirectory(directory).claim(patience=0)


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "data.num_workers: "),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "data.num_workers: "),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "another process "),
        (RuntimeError("NCCL communicator was aborted on rank 1."), "another process "),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None),
        (TrainingError("a loss of nan; kept in /logs/nccl-run/bad_step.pt"), None),
    ],
)
def test_lost_process__recognises_only_dead_processes(error, start, tmp_path):
    found = lost_process(error, tmp_path / "nccl-run")
    if start is None:
        assert found is None
    else:
        assert str(found).startswith(start)
        assert f"resume={tmp_path}/nccl-run" in str(found)


def test_vanished_images__stop_the_training(image_tree, tmp_path):
    process, _ = start_endless(tmp_path, image_tree)
    for path in (image_tree / "train" / "pagoda").iterdir():
        path.unlink()
    process.join(60)
    assert process.exitcode == 1
    assert "not a readable image (no such file)" in (tmp_path / "stderr.txt").read_text()


def test_vanished_images__are_skipped_and_listed(image_tree, tmp_path):
    """With data.on_corrupt=skip, optimiser steps follow after the image was listed in skipped.txt."""
    process, directory = start_endless(tmp_path, image_tree, "data.on_corrupt=skip")
    (image_tree / "train" / "pagoda" / "pagoda_0.jpg").unlink()
    wait_until((directory / "skipped.txt").exists, "skipped.txt", process)
    step = last_checkpoint(directory)["global_step"]
    wait_until(lambda: last_checkpoint(directory)["global_step"] > step, "optimiser step", process)
    end_with(process)
    assert "pagoda_0.jpg: not a readable image (no such file)" in (directory / "skipped.txt").read_text()
