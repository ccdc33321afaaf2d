"""What a training logs before it starts and summarises after it ends."""

import json
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from greedy import write_greedy
from programs import PROJECT, QUICK, error_of, metrics, run, run_directories
from vitrail.commands import train as command
from vitrail.runs.assembly import build_data, build_module
from vitrail.runs.directory import RunDirectory
from vitrail.runs.loggers import MetricsCSV


def logged_settings(caplog, *overrides, devices=1):
    """Return what is logged before a training with these overrides on `devices` CPUs."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", ["trainer=cpu", *overrides, "paths.run=/runs/one"])
        data = build_data(config)
        data.prepare_data()
        module = build_module(config, data)
    trainer = SimpleNamespace(
        world_size=devices,
        accumulate_grad_batches=config.trainer.get("accumulate_grad_batches", 1),
        accelerator=SimpleNamespace(name=lambda: "cpu"),
    )
    with caplog.at_level("INFO", logger="vitrail"):
        command._log_settings(config, module, data, trainer, RunDirectory("/runs/one"))
    return caplog.text


def test_settings__model_input_and_effective_batch_size(caplog):
    """0.23 M parameters; batch size 16 on 2 devices, 3 batches accumulated: 96 images per optimiser step."""
    options = ("data.batch_size=16", "trainer.accumulate_grad_batches=3", "optimizer.lr=0.002")
    text = logged_settings(caplog, *options, devices=2)
    assert "/runs/one" in text
    assert "vit_nano, 0.23 M parameters, 32 x 32 px, 10 classes" in text
    assert "effective batch 96" in text
    assert "lr 0.002" in text
    assert "2 x cpu, precision 32-true" in text
    assert "WARNING" not in text


@pytest.mark.parametrize(
    ("overrides", "made_for", "size"),
    [
        (("model=deit", "model.name=deit_tiny_patch16_224"), 224, 32),
        (("model=deit", "model.name=deit_tiny_patch16_224", "data.image_size=[32,112]"), 224, 112),
        (("model=timm", "model.name=resnet18"), 224, 32),
    ],
)
def test_settings__warn_about_digits_for_a_network_made_for_larger_images(overrides, made_for, size, caplog):
    assert logged_settings(caplog, *overrides).count("WARNING") == 1
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{made_for} pixels" in record.getMessage()
    assert f"{size}: " in record.getMessage()
    assert "data.root" in record.getMessage()


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=vit_nano",),
        ("model=deit", "model.name=deit_tiny_patch16_224", "data.image_size=128"),
        ("model=deit", "model.name=deit_tiny_patch16_224", "data=imagefolder", "data.image_size=32"),
    ],
    ids=("a network for small images", "more than half the size", "other data"),
)
def test_settings__do_not_warn(overrides, image_tree, caplog):
    root = (f"data.root={image_tree}",) if "data=imagefolder" in overrides else ()
    assert "WARNING" not in logged_settings(caplog, *overrides, *root)


def finished_trainer(**metrics):
    return SimpleNamespace(current_epoch=3, callback_metrics=metrics)


def test_summary__best_of_all_epochs_and_median_speed(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    for epoch, (top1, ema, speed) in enumerate(((10.0, 5.0, 100.0), (30.0, 20.0, 900.0), (20.0, 25.0, 300.0))):
        log.log_metrics({"epoch": epoch, "val/top1": top1, "val/top1_ema": ema}, epoch)
        log.log_metrics({"epoch": epoch, "speed/images_per_second": speed}, epoch)
    (tmp_path / "skipped.txt").write_text("a.jpg: broken\nb.jpg: broken\na.jpg: broken\n")
    trainer = finished_trainer(**{"val/top1": 20})
    assert command._summarise(log, trainer, 12.34, RunDirectory(tmp_path)) == {
        "val/top1": 30,
        "val/top1_ema": 25,
        "epochs": 3,
        "seconds": 12.3,
        "images_per_second": 300,
        "skipped_images": 2,
        "last": {"val/top1": 20},
    }


def test_summary__without_validation_or_speed(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"epoch": 0, "train/loss": 2.0}, 1)
    results = command._summarise(log, finished_trainer(), 1.0, RunDirectory(tmp_path))
    assert results == {"epochs": 3, "seconds": 1.0, "images_per_second": 0, "skipped_images": 0, "last": {}}


def test_train__without_validation_ends_with_a_summary(tmp_path):
    result = run("train.py", *QUICK, "trainer.limit_val_batches=0", logs=tmp_path)
    (directory,) = run_directories(tmp_path)
    assert "val/top1" not in json.loads((directory / "results.json").read_text())
    assert "train/loss" in metrics(directory)[0]
    assert result.returncode == 0, result.stderr
    assert "Training finished" in result.stdout


def test_train__resume_and_reproduce_together_are_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    error = error_of(run("train.py", f"resume={tmp_path}", f"reproduce={tmp_path}", logs=tmp_path))
    assert "reproduce=" in error
    assert "resume=" in error


def test_train__unwritable_run_directory_is_named(tmp_path):
    (tmp_path / "train").write_text("a file instead of a folder")
    assert str(tmp_path / "train") in error_of(run("train.py", "trainer=cpu", logs=tmp_path))


def test_train__out_of_memory_is_one_sentence_with_the_keys_to_change(tmp_path):
    arguments, variables = write_greedy(tmp_path)
    options = (*arguments, *QUICK, "data.batch_size=32", "grad_checkpointing=true")
    error = error_of(run("train.py", *options, logs=tmp_path, **variables))
    assert error.startswith("error: data.batch_size=32: out of memory on cpu in epoch 1, step 1, with grad_checkpoint")
    assert "weights 0.00, gradients 0.00, optimiser state 0.00, EMA weights 0.00" in error
    assert error.endswith("Set data.batch_size=16 trainer.accumulate_grad_batches=2 (the same effective batch).")
    halved = ("data.batch_size=16", "trainer.accumulate_grad_batches=2")
    result = run("train.py", *arguments, *QUICK, *halved, logs=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
