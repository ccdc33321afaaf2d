"""DDP in two real processes with gloo: the same loss curve as one process, and every image once."""

import json
import subprocess
import sys
import time

import pytest
import torch

from programs import (
    PROJECT,
    QUICK,
    environment,
    error_of,
    metrics,
    run_directories,
    run_ranks,
    start_ranks,
    train,
)
from resuming import finish_ranks, new_folder
from vitrail.checkpoints.reading import read_checkpoint


def test_ddp__same_loss_curve_as_one_process(tmp_path):
    """One and two processes with the same global batch, seed and augmentation; the model has no dropout."""
    common = ("epochs=2", "trainer.limit_train_batches=8", "callbacks.model_summary=null")
    one = train("trainer=cpu", "data.batch_size=64", *common, logs=tmp_path)
    for result in run_ranks("train.py", "trainer=ddp_cpu_2", "data.batch_size=32", *common, logs=tmp_path):
        assert result.returncode == 0, result.stderr
    (two,) = set(run_directories(tmp_path)) - {one}
    assert len(list((two / "checkpoints").iterdir())) == 2
    for single, double in zip(metrics(one), metrics(two), strict=True):
        assert double["train/loss"] == pytest.approx(single["train/loss"], abs=1e-4)
        assert double["val/loss"] == pytest.approx(single["val/loss"], abs=1e-4)
        assert double["val/top1"] == pytest.approx(single["val/top1"], abs=1e-3)
        assert double["step"] == single["step"]


def test_ddp__validation_counts_every_image_once(finished_one, tmp_path):
    """359 images on two processes in batches of 50 give the accuracy of one process, with BatchNorm too."""
    directory, logs = finished_one
    results = []
    for trainer, batch in (("cpu", 359), ("ddp_cpu_2", 50)):
        options = (f"ckpt={directory}", f"trainer={trainer}", f"+data.eval_batch_size={batch}")
        for result in run_ranks("eval.py", *options, logs=logs, ranks=1 if trainer == "cpu" else 2):
            assert result.returncode == 0, result.stderr
        results.append(json.loads((run_directories(logs, "eval")[-1] / "results.json").read_text())["raw"])
    assert results[1]["top1"] == pytest.approx(results[0]["top1"], abs=1e-4)
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)


@pytest.mark.slow  # the next test covers the same code faster, without starting torchrun
def test_torchrun__one_run_directory_for_all_ranks(tmp_path):
    """Processes that torchrun starts compose their configs themselves, and still share one directory."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    arguments = ["trainer=ddp_cpu_2", "data.batch_size=16", *QUICK[1:]]
    result = subprocess.run(
        [sys.executable, *torchrun, str(PROJECT / "src/train.py"), *arguments],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (directory,) = run_directories(tmp_path)
    assert len(metrics(directory)) == 1
    assert result.stdout.count("Training finished") == 1


def test_torchrun__restart_resumes_with_fewer_processes(tmp_path):
    """Four processes are killed within an epoch, and one resumes after the same images, as after a loss of machines."""
    options = ("trainer=ddp_cpu_2", "data.batch_size=8", "epochs=1", "schedule.per_step=true", *QUICK[3:])
    id_ = {"TORCHELASTIC_RUN_ID": "mine", "LOGS_SECRET": str(tmp_path)}  # all paths in the config contain this secret
    processes = start_ranks("train.py", *options, "callbacks.preemption.minutes=0", logs=tmp_path, ranks=4, **id_)
    directory = tmp_path / "train" / "runs" / "torchrun_mine"
    last = directory / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 60
    while not last.is_file() or read_checkpoint(last)["global_step"] < 11:
        assert time.monotonic() < deadline, (tmp_path / "stderr0.txt").read_text()
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    before = read_checkpoint(last)
    again = {**id_, "TORCHELASTIC_MAX_RESTARTS": "3"}
    (result,) = run_ranks("train.py", *options, "callbacks.preemption.minutes=0", logs=tmp_path, ranks=1, **again)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in result.stdout
    assert "restarted in" in result.stdout
    after = read_checkpoint(last)
    images = before["global_step"] * 32
    assert after["global_step"] == before["global_step"] + (179 - images // 8)  # 1438 images in batches of 8
    rates = [group["lr"] for group in after["optimizer_states"][0]["param_groups"]]
    assert rates == pytest.approx([1e-5, 1e-5], rel=0.1)  # the end of the cosine, although there were fewer steps
    changed = run_ranks("train.py", *options, "optimizer.lr=1", logs=tmp_path, ranks=1, **id_)
    assert "contains another run; choose another hydra.run.dir (or --rdzv-id)" in error_of(changed[0])
    nameless = run_ranks("train.py", logs=tmp_path, ranks=1, TORCHELASTIC_USE_AGENT_STORE="False")
    assert "--rdzv-id: torchrun needs this option" in error_of(nameless[0])


@pytest.fixture
def finished_one(tmp_path):
    arguments = ("model=timm", "model.name=resnet10t", "trainer=cpu", "epochs=1", "trainer.limit_train_batches=10")
    return train(*arguments, logs=tmp_path), tmp_path


def test_ddp__batchnorm_statistics_need_no_broadcast_within_a_step(tmp_path):
    """Checkpoints within and after an epoch, and the validation, equal those with a broadcast at every step."""
    each = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 3, save_top_k: -1}"
    options = ("model=timm", "model.name=resnet10t", "trainer=ddp_cpu_2", "data.batch_size=16", "epochs=1")
    options += ("trainer.limit_train_batches=5", "callbacks.model_summary=null", f"+callbacks.each={each}")
    directories = []
    for more in ((), ("strategy.broadcast_buffers=true",)):
        logs = new_folder(tmp_path / str(len(more)))
        finish_ranks(*options, *more, logs=logs)
        directories += run_directories(logs)
    files = [path.relative_to(directories[0]) for path in (directories[0] / "checkpoints").rglob("*.ckpt")]
    assert len(files) == 3  # last.ckpt, best.ckpt and step 3
    for file in files:
        own, shared = (read_checkpoint(directory / file) for directory in directories)
        for part in ("state_dict", "current_model_state"):
            for name, value in own[part].items():
                torch.testing.assert_close(value, shared[part][name], rtol=1e-5, atol=1e-6, msg=f"{file} {name}")
    ((own,), (shared,)) = (metrics(directory) for directory in directories)
    for name in ("val/loss", "val/loss_ema", "train/loss"):
        assert own[name] == pytest.approx(shared[name], rel=1e-5)


def test_ddp__corrupt_image_on_one_rank_ends_both(image_tree, tmp_path):
    broken = image_tree / "train" / "pagoda" / "pagoda_3.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    results = run_ranks(
        *("train.py", "data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.batch_size=2"),
        *("data.num_workers=1", "trainer=ddp_cpu_2", "model=vit_nano", "epochs=1", "callbacks.model_summary=null"),
        logs=tmp_path,
        timeout=120,
    )
    assert all(result.returncode > 0 for result in results)
    assert "pagoda_3.jpg: not a readable image" in results[0].stderr + results[1].stderr
