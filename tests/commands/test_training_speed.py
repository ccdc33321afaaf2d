"""`train=true` of src/benchmark.py: the figures of a training step, and which training they are of."""

import json

import pytest

from programs import error_of, run
from vitrail.runs.config import compose
from vitrail.runs.measured_config import compared, training_config
from vitrail.runs.measuring import MeasuredTraining
from vitrail.training.step_timer import PARTS

TINY = ("trainer=cpu", "data.batch_size=4", "rounds=1", "warmup=1", "steps=2")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Output and figures of DeiT-nano with mixup, and of LV-ViT-nano with token labels against it."""
    folder = tmp_path_factory.mktemp("speed")
    against = (
        "against=['model=lvvit_nano','model.token_head=true','objective=token_labeling','mixing=mixtoken',"
        "'grad_checkpointing=true','data.image_size=64']"
    )
    options = ("train=true", "model=deit_nano", "mixing=mixup_cutmix", *TINY, "peak=1e12", against)
    result = run("benchmark.py", *options, f"json={folder}/figures.json", logs=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "figures.json").read_text())


def test_table__names_both_trainings_and_all_parts(measured):
    out, _ = measured
    words = " ".join(out.split())
    for text in ("deit_nano, 32x32, batch 4", "lvvit_nano, 64x64", "checkpointed", "EMA update", "activations"):
        assert text in words, text


@pytest.mark.parametrize("prefix", ["", "against_"])
def test_figures__parts_add_up(prefix, measured):
    figures = {name.removeprefix(prefix): value for name, value in measured[1].items() if name.startswith(prefix)}
    assert sum(figures[f"{part}_ms"] for part in PARTS) == pytest.approx(figures["ms"], rel=1e-3)
    assert figures["images_per_second"] == pytest.approx(4e3 / figures["ms"], rel=1e-3)
    assert figures["time_over_bare"] == pytest.approx(
        figures["bare_images_per_second"] / figures["images_per_second"], rel=1e-3
    )
    assert all(figures[f"{part}_ms"] > 0 for part in PARTS)
    memory = [figures[f"{part}_mib"] for part in ("weights", "gradients", "optimizer", "average", "activations")]
    assert all(value > 0 for value in memory)
    assert figures["peak_mib"] > sum(memory)
    assert 0 < figures["share_of_peak"] < 1
    assert "kernel_launches" not in figures


def test_figures__ratio_of_the_two(measured):
    figures = measured[1]
    ratio = figures["images_per_second"] / figures["against_images_per_second"]
    assert figures["throughput_over_against"] == pytest.approx(ratio)


def test_data__the_loader_is_measured_if_data_is_given(tmp_path):
    result = run("benchmark.py", "train=true", "model=deit_nano", "data=digits", *TINY, logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Digits" in result.stdout
    assert "not known" in result.stdout  # the peak of a CPU
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("overrides", "size", "classes"),
    [
        (["model=deit_nano"], (32, 32), 1000),
        (["model=deit_small"], (224, 224), 1000),
        (["model=deit_small", "data.image_size=64"], (64, 64), 1000),
        (["experiment=cifar100_t2t_vit_14"], (224, 224), 100),
        (["experiment=lvvit_s"], (224, 224), 1000),
    ],
)
def test_synthetic__has_the_shape_of_the_trainings_data(overrides, size, classes, tmp_path):
    training = MeasuredTraining(training_config([*overrides, "trainer=cpu"]), tmp_path, 1, 1)
    assert training.data.input.size == size
    assert training.module.num_classes == classes


def test_step__is_that_of_the_config(tmp_path):
    options = ["model=deit_nano", "optimizer=lamb", "callbacks.ema.decay=0.5", "mixing=mixup_cutmix"]
    training = MeasuredTraining(training_config([*options, "trainer=cpu", "data.batch_size=4"]), tmp_path, 1, 1)
    before = {name: tensor.clone() for name, tensor in training.module.model.state_dict().items()}
    training.run(bare=False)
    trainer = training.module.trainer
    assert type(trainer.optimizers[0]).__name__ == "Lamb"
    assert "EMA" in {type(callback).__name__ for callback in trainer.callbacks}
    assert training.module.mixing is not None
    assert trainer.global_step == 4  # one to warm up, one measured, two for memory
    assert any(not before[name].equal(tensor) for name, tensor in training.module.model.state_dict().items())
    assert training.figures().bare is None


@pytest.mark.parametrize(
    ("against", "expected"),
    [
        ("deit_nano", ["epochs=1", "trainer=cpu", "model=deit_nano"]),
        ("resnet18", ["epochs=1", "trainer=cpu", "model=timm", "model.name=resnet18"]),
        (["compile=default"], ["model=vit", "+model.depth=2", "epochs=1", "trainer=cpu", "compile=default"]),
        (["epochs=2", "vit_nano"], ["trainer=cpu", "epochs=2", "model=vit_nano"]),
    ],
)
def test_compared__replaces_overrides_of_the_same_keys(against, expected):
    assert compared(["model=vit", "+model.depth=2", "epochs=1", "trainer=cpu"], against) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("steps=0",), "steps=0: "),
        (("peak=-1",), "peak=-1"),
        (("synthetic=maybe",), "synthetic=maybe: "),
        (
            ("phases=efficienttrain",),
            "phases: only plain training with one image size can be measured; set phases=null",
        ),
        (("experiment=segmentation", "data.root=/none"), "objective: only the training of classifiers can be measured"),
        (("against=no_such_model",), "no_such_model"),
        (("steeps=3",), "steeps"),
    ],
)
def test_settings__invalid_ones_are_refused(options, message, tmp_path):
    assert message in error_of(
        run("benchmark.py", "train=true", "model=deit_nano", "trainer=cpu", *options, logs=tmp_path)
    )


def test_keys__null_groups_and_the_plain_benchmark_are_those_of_their_configs():
    assert compose("benchmark_train", ["mixing=null", "train=true"]).mixing is None
    assert "train" not in compose("train", [])
