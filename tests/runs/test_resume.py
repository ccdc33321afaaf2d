"""A training that is killed at any step and resumed ends with the weights of an uninterrupted one."""

import itertools
import time

import pytest
import torch

from assembly import assemble
from programs import metrics, run_directories
from resuming import (
    RANDOM_DRAWS,
    assert_same_state,
    end_with,
    finish_ranks,
    fit,
    last_checkpoint,
    new_folder,
    resume_after_kills,
    start_held,
)
from vitrail.runs.resume import ResumePosition

pytestmark = pytest.mark.thorough


def test_resume__from_every_step_gives_the_same_weights(image_tree, tmp_path):
    """A checkpoint after each of the 4 optimiser steps of 3 epochs; an epoch's last one follows its validation."""
    copies = new_folder(tmp_path / "copies")
    expected = fit(tmp_path / "whole", image_tree, copies=copies)
    checkpoints = sorted(copies.iterdir())
    assert [torch.load(path, weights_only=True)["global_step"] for path in checkpoints] == list(range(1, 13))
    for path in checkpoints[:-1]:
        assert_same_state(fit(tmp_path / path.stem, image_tree, ckpt=path), expected, path.stem)


@pytest.mark.parametrize("render", ["loader", "device"])
@pytest.mark.sample(1)
def test_resume__killed_twice_gives_the_same_bits(render, image_tree, tmp_path):
    """SIGKILL after step 2, within the first epoch, and after step 6, within the second; two loader workers."""
    arguments = (*RANDOM_DRAWS, f"data.root={image_tree}", "data.num_workers=2", f"data.render={render}")
    directory = resume_after_kills(*arguments, folder=tmp_path, steps=(2, 6))
    assert [row["epoch"] for row in metrics(directory)] == [0, 1, 2]
    assert all("train/lr" in row and "val/top1" in row for row in metrics(directory)[1:])


def test_resume__two_processes_give_the_same_weights(image_tree, tmp_path):
    """SIGKILL to both processes within the second epoch; resumed, the weights agree to 1e-6."""
    arguments = (*RANDOM_DRAWS, "trainer=ddp_cpu_2", f"data.root={image_tree}", "data.num_workers=1")

    expected = finish_ranks(*arguments, logs=new_folder(tmp_path / "whole"))
    assert expected["global_step"] == 6
    logs = new_folder(tmp_path / "killed")
    for process in start_held(*arguments, logs=logs, step=3, ranks=2):
        end_with(process)
    (directory,) = run_directories(logs)
    assert last_checkpoint(directory)["global_step"] == 3
    resumed = finish_ranks(f"resume={directory}", logs=logs)
    for key, value in resumed["current_model_state"].items():
        torch.testing.assert_close(value, expected["current_model_state"][key], rtol=0, atol=1e-6)


def test_resume__clock_may_jump(image_tree, tmp_path, monkeypatch):
    """The system clock jumps back and forth by days, before the checkpoint's step and after: the same weights."""
    copies = new_folder(tmp_path / "copies")
    expected = fit(tmp_path / "whole", image_tree, copies=copies)
    sign, plain = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: plain() + (-1) ** next(sign) * 1e6)
    assert_same_state(fit(tmp_path / "jumping", image_tree, ckpt=copies / "05.ckpt"), expected)


class KeysPerBatch(ResumePosition):
    """Collects the image keys of each training batch as (epoch, keys)."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, list(batch.key)))


def batches_of(folder, root, *options, ckpt=None):
    """Train in this process and return the (epoch, keys) of its batches."""
    arguments = (*RANDOM_DRAWS, f"data.root={root}", "data.num_workers=0", *options)
    trainer, module, data = assemble(new_folder(folder), *arguments)
    recorder = KeysPerBatch()
    trainer.callbacks = [recorder if type(item) is ResumePosition else item for item in trainer.callbacks]
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder.batches


@pytest.mark.parametrize(
    ("batch_size", "accumulation"), [(2, 2), (4, 1), (1, 4)], ids=("same batch size", "larger", "smaller")
)
def test_resume_position__starts_after_the_images_already_seen(batch_size, accumulation, image_tree, tmp_path):
    """Step 5 is the first of epoch 1 and took 4 of its 16 images; the other 12 follow, in the epoch's order."""
    copies = new_folder(tmp_path / "copies")
    fit(tmp_path / "whole", image_tree, copies=copies)
    whole = batches_of(tmp_path / "again", image_tree)
    order = [key for epoch, keys in whole if epoch == 1 for key in keys]
    assert len(set(order)) == 16
    options = (f"data.batch_size={batch_size}", f"trainer.accumulate_grad_batches={accumulation}", "mixing=none")
    resumed = batches_of(tmp_path / "resumed", image_tree, *options, ckpt=copies / "05.ckpt")
    assert resumed[0][0] == 1
    rest = [keys for epoch, keys in resumed if epoch == 1]
    assert [key for keys in rest for key in keys] == order[4:]
    assert {len(keys) for keys in rest} == {batch_size}
    assert len({key for epoch, keys in resumed if epoch == 2 for key in keys}) == 16
