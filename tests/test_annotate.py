"""src/annotate.py and src/doctor.py in real processes, one of which is killed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from programs import PROJECT, environment, error_of, run, train
from vitrail.data.label_maps import LabelMapStore


@pytest.fixture
def photographs(tmp_path):
    """60 different crops of scikit-learn's photographs, of two classes of ImageNet."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    for split, count in (("train", 30), ("val", 1)):
        for name, picture in zip(("n03781244", "n11939491"), pictures, strict=True):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                piece = Image.fromarray(picture).crop((10 * number, 5 * number, 10 * number + 330, 5 * number + 270))
                piece.save(folder / f"{number}.jpg")
    return tmp_path / "images"


def parts_done(out):
    """Return the number of images that each of two processes has finished."""
    done = np.load(out / "done.npy") if (out / "begun.json").is_file() else np.zeros(60)
    return int(done[:30].sum()), int(done[30:].sum())


@pytest.mark.slow  # 50 s; tests/data/label_maps/test_store.py kills the writer
def test_annotate__continues_after_a_kill_without_repeating_or_losing_images(photographs, tmp_path):
    common = ("annotator=efficientnet_lite0", f"data.root={photographs}", "batch_size=1", "num_workers=0", "top_k=2")
    whole = run("annotate.py", *common, "annotator.image_size=320", f"out={tmp_path / 'whole'}", logs=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "60 of 60 images to annotate on cpu" in " ".join(whole.stdout.split())

    out = tmp_path / "killed"
    arguments = (*common, "annotator.image_size=320", f"out={out}", "processes=2")
    command = [sys.executable, str(PROJECT / "src" / "annotate.py"), *arguments]
    process = subprocess.Popen(command, env=environment(tmp_path), start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while min(parts_done(out)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = sum(parts_done(out))
    assert 6 <= finished < 60

    again = run("annotate.py", *arguments, logs=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{60 - finished} of 60 images to annotate on cpu, cpu" in " ".join(again.stdout.split())
    one, two = LabelMapStore.open(tmp_path / "whole"), LabelMapStore.open(out)
    assert one.about == two.about
    for index in range(60):
        np.testing.assert_array_equal(one[index][1], two[index][1])
        np.testing.assert_allclose(one[index][0], two[index][0], rtol=2e-3, atol=2e-3)
    assert not list(two.damaged_parts())


@pytest.mark.slow
def test_annotate__with_your_own_network(image_tree, tmp_path):
    """Train a convnet, annotate with it, run the doctor, and train with the maps; then annotate broken images."""
    data = ("data=imagefolder", f"data.root={image_tree}", "data.image_size=64", "data.num_workers=0")
    quick = ("trainer=cpu", "callbacks.model_summary=null", "data.batch_size=8", "augment.scale=[0.9,1.0]")
    network = ("model=timm", "model.name=test_resnet", "+model.output_stride=8", "optimizer.lr=3e-3")
    annotator = train(*data, *quick, *network, "epochs=12", "schedule.warmup_epochs=1", logs=tmp_path)
    maps = tmp_path / "maps"
    arguments = ("annotator=run", f"annotator.ckpt={annotator}", "annotator.weights=raw", f"data.root={image_tree}")
    done = run("annotate.py", *arguments, f"out={maps}", "top_k=2", logs=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    store = LabelMapStore.open(maps)
    assert (store.grid, store.about["annotator"], store.about["class_names"]) == (
        (8, 8),
        "test_resnet",
        ["flower", "pagoda"],
    )
    doctor = run("doctor.py", f"data.root={image_tree}", f"data.label_maps={maps}", logs=tmp_path)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "No problems found" in doctor.stdout
    network = ("model=lvvit_nano", "model.token_head=true", "augment=lvvit")
    objective = ("objective=token_labeling", f"data.label_maps={maps}", "epochs=1")
    trained = train(*data, *quick, *network, *objective, logs=tmp_path)
    with Image.open(trained / "label_maps.png") as picture:
        assert picture.size == (6 + 5 * 174 + 236, 40 + 8 * 186)

    broken = image_tree / "train" / "flower" / "flower_7.jpg"
    broken.write_bytes(b"no picture")
    failed = run("annotate.py", *arguments, f"out={tmp_path / 'more'}", "top_k=2", "processes=2", logs=tmp_path)
    assert "flower_7.jpg: not a readable image" in error_of(failed)
    sick = run("doctor.py", f"data.root={image_tree}", "checksums=false", logs=tmp_path)
    assert sick.returncode == 1
    assert "1 problem found" in sick.stdout
