"""`python src/train.py` and `python src/eval.py` in real processes."""

import json
import re
import shutil
import subprocess
from importlib import metadata

import pytest
import torch
import yaml

from programs import PROJECT, QUICK, error_of, metrics, run, run_directories, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs on all digits, and its terminal output."""
    logs = tmp_path_factory.mktemp("logs")
    result = run("train.py", "trainer=cpu", "epochs=2", "model.drop_path_rate=0.1", logs=logs)
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(logs)
    return directory, result.stdout


def test_run_directory__contains_all_files(finished):
    directory, _ = finished
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}-[0-9a-f]{2}", directory.name)
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert files == {
        *("config.yaml", "overrides.txt", "versions.yaml", "metrics.csv", "results.json", "train.log"),
        *("first_batch.png", "predictions.png", "checkpoints/last.ckpt", "checkpoints/best.ckpt", ".lock"),
    }
    assert (directory / "overrides.txt").read_text().splitlines() == [
        *("trainer=cpu", "epochs=2", "model.drop_path_rate=0.1")
    ]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert config["model"]["drop_path_rate"] == 0.1
    versions = yaml.safe_load((directory / "versions.yaml").read_text())
    assert versions["packages"]["torch"] == metadata.version("torch")
    head = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert versions["commit"].removesuffix("-dirty") == head.stdout.strip()
    assert "epoch 2/2" in (directory / "train.log").read_text()


def test_metrics__one_row_per_epoch_with_all_documented_columns(finished):
    rows = metrics(finished[0])
    assert [row["epoch"] for row in rows] == [0, 1]
    assert [row["step"] for row in rows] == [21, 43]  # 22 full batches of 64 per epoch, counted from 0
    promised = {
        *("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/top1", "val/top5"),
        *("val/loss_ema", "val/top1_ema", "val/top5_ema", "speed/images_per_second", "speed/data_wait"),
    }
    assert promised <= rows[1].keys()
    assert rows[1]["train/loss"] < rows[0]["train/loss"]
    assert rows[0]["train/lr"] == pytest.approx(1e-6)
    # top-1 times the 359 validation images is a whole number
    hits = rows[1]["val/top1"] * 3.59
    assert hits == pytest.approx(round(hits), abs=1e-3)


def test_terminal__shows_summary_progress_and_table(finished):
    directory, output = finished
    for expected in ("0.23 M parameters", "VisionTransformer", "epoch 2/2", "Training finished", "best top-1", "EMA"):
        assert expected in output
    assert f"eval.py ckpt={directory.relative_to(directory.parents[2])}" in output
    results = json.loads((directory / "results.json").read_text())
    assert results["epochs"] == 2
    assert f"{results['val/top1']:.2f} % with the raw weights" in output


def test_checkpoint__contains_plain_containers_only(finished):
    checkpoint = torch.load(finished[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["classes"] == [str(digit) for digit in range(10)]
    assert checkpoint["config"]["model"]["name"] == "vit_nano"
    assert all(key.startswith("model.") for key in checkpoint["state_dict"])
    assert not any("_orig_mod" in key for key in checkpoint["state_dict"])


def test_eval__same_accuracies_as_the_training(finished):
    directory, _ = finished
    logs = directory.parents[2]
    result = run("eval.py", f"ckpt={directory}/checkpoints/last.ckpt", "trainer=cpu", logs=logs)
    assert result.returncode == 0, result.stderr
    results = json.loads((run_directories(logs, "eval")[-1] / "results.json").read_text())
    last = metrics(directory)[-1]
    assert results["raw"]["images"] == 359
    assert results["raw"]["top1"] == pytest.approx(last["val/top1"], abs=1e-3)
    assert results["ema"]["top1"] == pytest.approx(last["val/top1_ema"], abs=1e-3)
    assert results["ema"]["loss"] == pytest.approx(last["val/loss_ema"], rel=1e-4)
    assert f"{results['ema']['top1']:.2f}" in result.stdout


def test_resume__finished_run_continues_with_more_epochs(finished, tmp_path):
    """In a copy of the run, because the other tests look at the finished one in any order."""
    logs = tmp_path / "logs"
    shutil.copytree(finished[0].parents[2], logs)
    (directory,) = run_directories(logs)
    assert "epochs are done" in error_of(run("train.py", f"resume={directory}", logs=logs))
    before = (directory / "config.yaml").read_bytes()
    refused = run("train.py", f"resume={directory}", "epochs=3", "data.image_size=64", logs=logs)
    assert "tensors of another shape (pos_embed)" in error_of(refused)
    assert (directory / "config.yaml").read_bytes() == before  # a refused resume does not change the run
    result = run("train.py", f"resume={directory}", "epochs=3", logs=logs)
    assert result.returncode == 0, result.stderr
    assert run_directories(logs) == [directory]
    rows = metrics(directory)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert yaml.safe_load((directory / "config.yaml").read_text())["model"]["drop_path_rate"] == 0.1
    # The third epoch starts at two thirds of a cosine over three epochs, not at the end of one over two.
    assert rows[2]["train/lr"] == pytest.approx(1e-5 + (1e-3 - 1e-5) / 4, rel=1e-4)
    assert json.loads((directory / "results.json").read_text())["epochs"] == 3


def test_own_images__with_all_options(image_tree, tmp_path):
    """Real JPEGs, DeiT's augmentation with mixing, a distilled backbone, accumulation, clipping and loader workers."""
    directory = train(
        *(
            "data=imagefolder",
            f"data.root={image_tree}",
            "data.image_size=64",
            "data.batch_size=4",
            "data.num_workers=1",
        ),
        *(
            "model=deit",
            "model.name=deit_tiny_distilled_patch16_224",
            "augment=deit",
            "trainer=cpu",
            "epochs=2",
            "callbacks.ema.decay=0.9",
        ),
        *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0", "grad_checkpointing=true"),
        *("objective=binary_cross_entropy", "optimizer=lamb", "schedule=cosine_per_epoch"),
        logs=tmp_path,
    )
    rows = metrics(directory)
    assert len(rows) == 2
    assert rows[1]["train/lr"] > rows[0]["train/lr"]
    hits = rows[1]["val/top1"] * 6 / 100
    assert hits == pytest.approx(round(hits), abs=1e-4)


@pytest.mark.slow
def test_compile__same_keys_and_same_curve(tmp_path):
    arguments = (*QUICK, "trainer.limit_val_batches=1")
    eager = train(*arguments, logs=tmp_path)
    compiled = train(*arguments, "compile=default", logs=tmp_path)
    load = lambda path: torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]  # noqa: E731
    assert load(eager).keys() == load(compiled).keys()
    for key, value in load(eager).items():
        torch.testing.assert_close(load(compiled)[key], value, rtol=1e-3, atol=1e-5)


def test_model__any_timm_backbone_by_name(tmp_path):
    directory = train(*QUICK, "model=timm", "model.name=resnet18", logs=tmp_path)
    checkpoint = torch.load(directory / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["model.fc.weight"].shape == (10, 512)
    result = run("eval.py", f"ckpt={directory}", "trainer=cpu", "weights=ema", logs=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_make_train__reaches_95_percent(tmp_path):
    """The accuracy that the README states for `make train`, with the same settings."""
    directory = train("trainer=cpu", logs=tmp_path, OMP_NUM_THREADS="2", timeout=900)
    results = json.loads((directory / "results.json").read_text())
    assert results["val/top1"] >= 95
    assert results["val/top1_ema"] >= 95
