"""Invalid input gives a one-line error that names the key or the file, exit status 1 and no traceback."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest
from PIL import Image

from programs import PROJECT, QUICK, environment, error_of, run, run_directories, train


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr: no such config key; did you mean optimizer.lr"),
        (["modle=vit_tiny"], "modle: no such config key"),
        (["model=vit_tinny"], "model=vit_tinny: no such file in conf/model/; did you mean vit_nano"),
        (["logger=mail"], "logger=mail: no such file in conf/logger/; choose from mlflow, tensorboard, wandb"),
        (["trainer=ddp_9gpu"], "trainer=ddp_9gpu: no such file"),
        (["augment.mix=null"], "augment.mix: renamed to mixing (mixing=none, mixup_cutmix, mixtoken)."),
        (["ckpt=weights.pth"], "ckpt: renamed to init_from."),
        (["checkpointing=true"], "checkpointing: renamed to grad_checkpointing."),
        (["optimizer.backbone_lr=0.1"], "optimizer.backbone_lr: renamed to optimizer.backbone_lr_scale."),
        (["callbacks.keep.minutes=1"], "callbacks.keep.minutes: renamed to callbacks.preemption.minutes."),
        (["+model.dense_head=true"], "model.dense_head: renamed to model.token_head."),
        (["~callbacks.numbers"], "callbacks.numbers: renamed to callbacks.nonfinite_guard."),
        (["++augment/mix=mixup"], "augment.mix: renamed to mixing (mixing=none, mixup_cutmix, mixtoken)."),
        (["data.label_maps=maps"], "data.label_maps: this config does not have it yet; write +data.label_maps=..."),
        (["model=deit_tiny"], "model=deit_tiny: renamed; write model=deit model.name=deit_tiny_patch16_224."),
        (["optimizer.lr=[1"], "optimizer.lr"),
        (
            ["data.root=/a=b"],
            """data.root=/a=b: contains characters that are special in Hydra; write "data.root='/a=b'".""",
        ),
        (["data.root=/(1)"], """write "data.root='/(1)'"."""),
        (["data.root=/x{y}"], """write "data.root='/x{y}'"."""),
        (["data.root=/#1"], """write "data.root='/#1'"."""),
        (["optimizer.lr=1e-3,5e-4"], "optimizer.lr=1e-3,5e-4: a comma separates values; to sweep over them add -m"),
        (["+experiment=fashion_mnist"], "experiment: this config has it already; write experiment=..."),
        (["-m", "hydra/launcher=joblib"], "hydra/launcher=joblib: not available; choose launcher= one of local, ray"),
        (["-m", "hydra/sweeper=ax"], "hydra/sweeper=ax: not available; choose sweep= one of grid, lr_wd"),
        (["+trainer.devices=1"], "trainer.devices: this config has it already; write trainer.devices=..."),
        (["callbacks=null"], "callbacks=null: train needs one of the files in conf/callbacks: default."),
        (["-m", "mixing=null,none"], "null: cannot be one of a sweep's values for a config group"),
        (["--lr=0.1"], "--lr=0.1: no such option; keys have no dashes: optimizer.lr=0.1."),
    ],
)
def test_config__unknown_name(arguments, sentence, tmp_path):
    assert sentence in error_of(run("train.py", *arguments, logs=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+colour=red"], "colour: no such config key; nothing reads it."),
        (["+model.colour=red"], "model"),
        (["+trainer.colour=red"], "trainer: no such key 'colour'."),
        (["model.num_classes=7"], "model.num_classes=7 does not fit the data, which has 10 classes."),
        (["data=imagefolder"], "data.root: not set"),
        (["data=imagefolder", "data.root=/nowhere/at/all"], "data.root=/nowhere/at/all: no such folder."),
        (["data.batch_size=2000"], "data.batch_size=2000 on 1 devices is more than the 1438 training images."),
        (["trainer=gpu"], "trainer.accelerator=gpu: no GPU is visible here"),
        (["model=timm"], "model.name: not set; list_models.py lists the names"),
        (["model=vit"], "model.name: not set; list_models.py"),  # another network in vitrail 0.1
        (["model=lvvit"], "model.name: not set; list_models.py"),
        (["model=timm", "model.name=resnet51"], "model.name=resnet51: no such backbone; did you mean resnet5"),
        (
            ["model=deit_nano", "data.image_size=18"],
            "data.image_size=18: deit_nano needs a multiple of its patch size 4",
        ),
        (["optimizer.name=adamm"], "optimizer.name=adamm"),
        (["resume=/nowhere"], "resume=/nowhere: not a run directory"),
        (["data.image_size=32x32"], "data.image_size=32x32: must be an integer of at least 1 or a list of 2 integers"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1: must be a number of at least 0 or null."),
        (["compile=foo"], "compile=foo: must be one of default, reduce-overhead,"),
        (["resume=5"], "resume=5: not a run directory"),
        (["-m", "hydra.launcher.parallel=x"], "hydra.launcher.parallel=x: must be an integer of at least 1 or null."),
        (["-m", "sweep=lr_wd", "hydra.sweeper.trials=0"], "hydra.sweeper.trials=0: must be an integer of at least 1."),
        (["seed=-1"], "seed=-1: must be an integer of at least 0."),
        (["trainer.accumulate_grad_batches=x"], "trainer.accumulate_grad_batches=x: must be an integer of at least 1."),
        (["trainer.limit_val_batches=0.0001"], "trainer: You requested to check 0.0001 of the `val_dataloader`"),
        (
            ["data=fashion_mnist", "data.source.download=false"],
            "FashionMNIST is missing and data.source.download=false.",
        ),
    ],
)
@pytest.mark.sample(10)
def test_config__invalid_value(arguments, sentence, tmp_path):
    if "trainer=gpu" not in arguments:
        arguments = [*QUICK, *arguments]
    assert sentence in error_of(run("train.py", *arguments, logs=tmp_path, VITRAIL_DATA=str(tmp_path / "data")))


def folder_error(tree, logs, *arguments):
    return error_of(
        run(
            *("train.py", "data=imagefolder", f"data.root={tree}", "data.image_size=32", "data.batch_size=4"),
            *("data.num_workers=1", *QUICK, *arguments),
            logs=logs,
        )
    )


def test_folders__different_classes(image_tree, tmp_path):
    (image_tree / "val" / "pagoda").rename(image_tree / "val" / "temple")
    sentence = folder_error(image_tree, tmp_path)
    assert "train and val have different classes: 1 only in train/ (pagoda) and 1 only in val/ (temple)." in sentence


def test_folders__truncated_image(image_tree, tmp_path):
    broken = image_tree / "train" / "flower" / "flower_2.jpg"
    broken.write_bytes(broken.read_bytes()[:3000])
    sentence = folder_error(image_tree, tmp_path, "trainer.limit_train_batches=null")
    assert f"{broken}: not a readable image (image file is truncated" in sentence


def test_folders__corrupt_images_skipped_on_request(image_tree, tmp_path):
    (image_tree / "train" / "flower" / "flower_2.jpg").write_text("no image")
    (image_tree / "val" / "flower" / "flower_1.jpg").write_text("no image either")
    directory = train(
        *("data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.batch_size=4"),
        *("model=vit_nano", "data.on_corrupt=skip", *QUICK, "trainer.limit_train_batches=null", "epochs=2"),
        logs=tmp_path,
    )
    lines = set((directory / "skipped.txt").read_text().splitlines())
    assert len(lines) == 2
    assert any("train/flower/flower_2.jpg: not a readable image" in line for line in lines)
    assert '"skipped_images": 2' in (directory / "results.json").read_text()


def test_imagenet__requires_1000_classes(image_tree, tmp_path):
    result = run("train.py", "data=imagenet", f"data.root={image_tree}", *QUICK, logs=tmp_path)
    assert "2 class folders are not the 1000 of ImageNet-1k" in error_of(result)


def test_run_directory__not_writable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = run("train.py", *QUICK, logs=tmp_path, VITRAIL_LOGS=str(tmp_path / "file"))
    assert str(tmp_path / "file") in error_of(result)


def test_debug__shows_the_traceback(tmp_path):
    result = run("train.py", "debug=smoke", "model.num_classes=7", logs=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "model.num_classes=7 does not fit" in result.stderr


def test_unexpected_error__traceback_is_in_the_log_file(tmp_path):
    run("train.py", *QUICK, "trainer.precision=bf17", logs=tmp_path)
    (directory,) = run_directories(tmp_path)
    assert "Traceback" in (directory / "train.log").read_text()


def test_eval__missing_or_invalid_checkpoint(image_tree, tmp_path):
    assert "no such file" in error_of(run("eval.py", "ckpt=/nowhere.ckpt", logs=tmp_path))
    picture = tmp_path / "picture.ckpt"
    Image.new("RGB", (4, 4)).save(picture, format="PNG")
    assert "not a checkpoint" in error_of(run("eval.py", f"ckpt={picture}", logs=tmp_path))


def test_resume__checkpoint_of_another_architecture(tmp_path):
    directory = train(*QUICK, logs=tmp_path)
    result = run("train.py", f"resume={directory}", "epochs=2", "model=deit_nano", logs=tmp_path)
    sentence = error_of(result)
    assert "checkpoints/last.ckpt does not fit" in sentence
    assert "cls_token" in sentence


def test_resume__file_instead_of_directory(tmp_path):
    directory = train(*QUICK, logs=tmp_path)
    message = error_of(run("train.py", f"resume={directory}/checkpoints/last.ckpt", logs=tmp_path))
    assert f"is a file; set it to the run directory: resume={directory}." in message


def test_folders__class_in_two_unicode_forms(image_tree, tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        (image_tree / split / "pagoda").rename(image_tree / split / unicodedata.normalize(form, "café"))
    assert "train and val write the class café in two Unicode forms" in folder_error(image_tree, tmp_path)


NAMES = ("[bold] a", "b [red]", "c [b]", "US$ 5", '100% "x", y', "a=b", "кошка", "🐈")


def test_class_names__are_shown_as_they_are(image_tree, tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            shutil.copytree(image_tree / split / ("flower" if number else "pagoda"), image_tree / split / name)
    checked = run("doctor.py", "data=imagefolder", f"data.root={image_tree}", logs=tmp_path, COLUMNS="200")
    assert checked.returncode == 0, checked.stderr
    assert "3 images of" in checked.stdout or "8 images of" in checked.stdout
    assert any(f"images of {name}" in checked.stdout for name in (*NAMES, "flower"))
    options = ("data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.batch_size=4")
    directory = train(*QUICK, *options, "data.num_workers=0", logs=tmp_path)
    shown = run("eval.py", f"ckpt={directory}", logs=tmp_path, COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in NAMES)
    assert run("export.py", f"ckpt={directory}", "to=hub", logs=tmp_path).returncode == 0


def test_class_names__that_are_not_utf8(image_tree, tmp_path):
    """Folders from an old file system: every file that contains their names can be written."""
    for split in ("train", "val"):
        (image_tree / split / "pagoda").rename(os.fsdecode(bytes(image_tree / split) + b"/chat_\xe9t\xe9"))
    options = ("data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.batch_size=4")
    directory = train(*QUICK, *options, "data.num_workers=0", logs=tmp_path)
    evaluated = run("eval.py", f"ckpt={directory}", logs=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert r"chat_\xe9t\xe9" in evaluated.stdout
    exported = run("export.py", f"ckpt={directory}", "to=hub", logs=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert r"chat_\xe9t\xe9" in json.loads((directory / "export/hub/config.json").read_text())["label_names"]


def test_shared_memory__too_small(image_tree, tmp_path):
    """Containers give 64 MB; here a mount of 1 MB in a name space of its own."""
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    program = [sys.executable, str(PROJECT / "src/train.py"), "data=imagefolder", f"data.root={image_tree}", *QUICK]
    program += ["model=vit_nano", "data.image_size=224", "data.batch_size=4", "data.num_workers=2"]
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", *program],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "--shm-size=8g), or set data.num_workers=0" in error_of(done)
