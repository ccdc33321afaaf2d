"""Helpers for tests that interrupt a training, resume it, and compare the weights with an uninterrupted one."""

import os
import shutil
import signal
import time
from pathlib import Path

import torch

from assembly import assemble
from programs import run, run_directories, run_ranks, start, start_ranks, train

RANDOM_DRAWS = (
    *("trainer=cpu", "model=deit_nano", "model.drop_path_rate=0.2", "model.drop_rate=0.1", "augment=deit"),
    *("data=imagefolder", "data.image_size=32", "data.batch_size=2", "model.patch_size=8", "epochs=3"),
    *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1", "callbacks.ema.decay=0.9"),
    *("schedule.warmup_epochs=1", "callbacks.model_summary=null", "callbacks.progress=null"),
)
"""A training of 3 epochs, 4 optimiser steps each on `image_tree`, with everything that is random or keeps a state:
augmentation, mixing, dropout, drop path, EMA weights, gradient accumulation and clipping."""

STATE = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
"""Entries of a checkpoint that two equal runs have in common."""


def new_folder(path):
    path.mkdir()
    return path


def last_checkpoint(directory):
    """Content of last.ckpt: raw and EMA weights, optimiser state, counters."""
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def finish_ranks(*options, logs):
    """Run a training of several processes to its end, and return its last checkpoint."""
    for result in run_ranks("train.py", *options, logs=logs):
        assert result.returncode == 0, result.stderr
    return last_checkpoint(run_directories(logs)[0])


def assert_same_state(checkpoint, expected, name=""):
    """Compare the entries `STATE` of two checkpoints, tensors bit for bit."""
    for part in STATE:
        assert_same(checkpoint[part], expected[part], f"{name} {part}")


def assert_same(one, other, path):
    """Compare two nested containers, tensors bit for bit."""
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
        assert one == other, f"{path}: {one} and {other}"


def fit(folder, root, ckpt=None, copies=None, more=()):
    """Train `RANDOM_DRAWS`, with `more` options, in this process and return the content of last.ckpt.

    With `copies`, a folder, save after every optimiser step and copy each last.ckpt there, as 01.ckpt, 02.ckpt, ...
    """
    minutes = "null" if copies is None else "0"
    options = (f"callbacks.preemption.minutes={minutes}", f"data.root={root}", "data.num_workers=0")
    trainer, module, data = assemble(new_folder(folder), *RANDOM_DRAWS, *options, *more)
    if copies is not None:
        copy_every_save(trainer.strategy.checkpoint_io, copies)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return last_checkpoint(folder)


def copy_every_save(checkpoint_io, copies):
    """Copy each last.ckpt that is written to the folder `copies`, as 01.ckpt, 02.ckpt, ..."""

    save = checkpoint_io.save_checkpoint

    def save_and_copy(checkpoint, path, storage_options=None):
        save(checkpoint, path)
        checkpoint_io.finish()
        if Path(path).name == "last.ckpt":
            shutil.copy(path, copies / f"{len(list(copies.iterdir())) + 1:02d}.ckpt")

    checkpoint_io.save_checkpoint = save_and_copy


def wait_until(happened, what, process=None, seconds=120):
    """Wait until `happened()` is true; fail after `seconds`, or as soon as `process` ends."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process is None or process.exitcode is None, f"the training ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.01)


def start_endless(logs, root, *arguments, **variables):
    """Start a training that runs until it is killed; return the process and the run directory with a last.ckpt."""
    endless = ("epochs=1000", "callbacks.preemption.minutes=0", "data.num_workers=1", f"data.root={root}")
    process = start("train.py", *RANDOM_DRAWS, *endless, *arguments, logs=logs, COLUMNS="400", **variables)
    wait_until(lambda: list(logs.glob("train/runs/*/checkpoints/last.ckpt")), "last.ckpt", process)
    return process, run_directories(logs)[0]


def start_held(*arguments, logs, step, ranks=1, rank=0):
    """Start a training that pauses after optimiser step `step` of this run, until it gets a signal.

    Return its processes once that step's last.ckpt is written. With several processes, `rank` is the one that pauses.
    """
    held = logs / "held"
    held.unlink(missing_ok=True)
    variables = {"HOLD_AT_STEP": str(step), "HOLD_FILE": str(held), "HOLD_RANK": str(rank), "COLUMNS": "400"}
    arguments = ("../tests/held_training.py", *arguments, "callbacks.preemption.minutes=0")
    if ranks == 1:
        processes = [start(*arguments, logs=logs, **variables)]
    else:
        processes = start_ranks(*arguments, logs=logs, ranks=ranks, **variables)
    wait_until(held.exists, f"step {step}", processes[rank])
    return processes


def resume_after_kills(*arguments, folder, steps):
    """Train twice, the second time with a SIGKILL after each of `steps`, and compare the final checkpoints bit for bit.

    Return the run directory of the second training.
    """
    expected = last_checkpoint(train(*arguments, logs=new_folder(folder / "whole")))
    logs = new_folder(folder / "killed")
    for step in steps:
        (process,) = start_held(*arguments, logs=logs, step=step)
        end_with(process)
        (directory,) = run_directories(logs)
        assert last_checkpoint(directory)["global_step"] == step
        arguments = (f"resume={directory}",)
    result = run("train.py", *arguments, logs=logs)
    assert result.returncode == 0, result.stderr
    assert run_directories(logs) == [directory]
    assert_same_state(last_checkpoint(directory), expected)
    return directory


def end_with(process, signum=signal.SIGKILL):
    """Send a signal to a process, wait for its end, and return its exit status."""
    os.kill(process.pid, signum)
    process.join(60)
    return process.exitcode


def child_processes(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
