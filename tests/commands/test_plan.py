"""The estimates of `plan=true` agree with independently known numbers."""

import re

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from programs import PROJECT, run, run_directories
from vitrail.commands.plan import make_plan
from vitrail.data.sources import Digits
from vitrail.reporting.plan import curve, plan_table


def planned(*overrides):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return make_plan(compose("train", [*overrides, "paths.run=/tmp/run", "trainer.precision=bf16-mixed"]))


def test_deit_small__agrees_with_its_header():
    plan = planned("experiment=deit_small", "trainer=ddp_8gpu")
    assert plan.missing == ["data.root"]
    assert (plan.batch, plan.devices, plan.images, plan.classes) == (1024, 8, 1_281_167, 1000)
    assert (plan.steps, plan.epochs) == (1251, 300)
    assert plan.cost.parameters == 22_050_664
    assert plan.rates[:3] == pytest.approx([1e-6, 1e-6, 1e-6 + (1e-3 - 1e-6) / 5])
    assert sum(plan.groups.values()) == plan.cost.parameters
    assert set(plan.groups) == {0.0, 0.05}
    header = (PROJECT / "conf/experiment/deit_small.yaml").read_text()
    assert plan.hours == pytest.approx(float(re.search(r"Expected: ([\d.]+) h", header)[1]), rel=0.02)
    assert "RandAugment rand-m9-mstd0.5-inc1" in plan.augmentation
    assert "mixup 0.8 or cutmix 1" in plan.augmentation


def test_linear_probe__counts_forward_passes_and_classifiers():
    plan = planned("experiment=linear_probe", "data=imagenet", "trainer=gpu")
    assert plan.groups == {0.0: 13 * 385 * 1000}
    assert plan.activations == 0
    assert plan.hours == pytest.approx(2 * plan.cost.macs * 10 * 10_009 * 128 / (0.3 * 312e12) / 3600)
    header = (PROJECT / "conf/experiment/linear_probe.yaml").read_text()
    assert plan.hours == pytest.approx(float(re.search(r"Expected: ([\d.]+) h", header)[1]), rel=0.02)


def test_segmentation__counts_steps_and_the_whole_network():
    plan = planned("experiment=seg_lvvit_s", "trainer=ddp_8gpu")
    assert plan.missing == ["data.root", "init_from"]
    assert (plan.images, plan.classes, plan.image_size) == (20_210, 150, (512, 512))
    assert plan.steps * plan.epochs == 160_000
    assert plan.cost.parameters == sum(plan.groups.values()) == 44_452_076
    assert plan.rates[0] == pytest.approx(6e-5 * (1 - 4000 / 160_000), rel=1e-3)  # the warm-up has 1,500 steps
    assert plan.rates[-1] == pytest.approx(6e-5 * 4000 / 160_000, rel=1e-2)
    assert plan.hours == pytest.approx(3 * 2 * plan.cost.macs * 160_000 * 32 / (8 * 0.3 * 312e12) / 3600)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(plan_table(plan))
    assert "a crop in which no class fills 75 % or more" in shown.get()
    assert "cores" not in shown.get()  # the speed of its loader has not been measured


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("lvvit_s", ["data.root", "data.label_maps"]),
        ("deit3_small_384", ["data.root", "init_from"]),
        ("fashion_mnist", []),
    ],
)
def test_missing__lists_the_required_keys(name, keys):
    assert planned(f"experiment={name}").missing == keys


def test_memory__grows_with_the_batch_and_shrinks_with_checkpointing():
    small, large = planned("data.batch_size=8"), planned("data.batch_size=16")
    assert large.memory - small.memory == pytest.approx(8 * small.activations)
    assert planned("grad_checkpointing=true").activations < 0.7 * small.activations
    assert planned("callbacks.ema=null").memory < planned().memory
    assert planned().images == len(Digits().open("train"))


def test_memory__shrinks_with_sharding():
    """Weights, gradients, AdamW's moments and EMA weights, 20 bytes per parameter, are sharded over eight devices."""
    whole, cut = (
        planned("model=deit", "model.name=deit_tiny_patch16_224", "data=imagenet", f"trainer={name}_8gpu")
        for name in ("ddp", "fsdp")
    )
    assert whole.memory - cut.memory == pytest.approx(whole.cost.parameters * 20 * 7 / 8)


def test_hours__include_teacher_and_submodels():
    """A teacher costs a third of a training step with its MACs (forward pass only); two submodels double the work."""
    alone = planned("experiment=deit_tiny", "trainer=ddp_8gpu")
    taught = planned("experiment=deit_tiny_distilled", "trainer=ddp_8gpu")
    assert taught.teacher.macs == pytest.approx(15.9e9, rel=0.01)
    assert taught.teacher.parameters == pytest.approx(83.6e6, rel=0.01)
    assert taught.hours / alone.hours == pytest.approx((taught.cost.macs + taught.teacher.macs / 3) / alone.cost.macs)
    cosub = planned("experiment=deit3_small", "objective=cosub", "trainer=ddp_8gpu")
    once = planned("experiment=deit3_small", "trainer=ddp_8gpu")
    assert cosub.hours == pytest.approx(2 * once.hours)
    assert cosub.activations == pytest.approx(2 * once.activations)


def test_phases__count_gpu_time_and_decoded_images_apart():
    """EfficientTrain: a ViT-S takes .49 and .72 of the operations at 160 and 192 pixels; the images stay the same."""
    plan = planned("experiment=deit_small_progressive", "trainer=ddp_8gpu")
    plain = planned("experiment=deit_small_progressive", "phases=none", "trainer=ddp_8gpu")
    assert [phase.image_size[0] for phase in plan.phases] == [160, 192, 224]
    assert [phase.magnitudes for phase in plan.phases] == [(1, 5), (7, 7), (9, 9)]
    assert [phase.epochs for phase in plan.phases] == [180, 60, 60]
    assert plan.operations == pytest.approx(0.6 * 0.49 + 0.2 * 0.72 + 0.2, abs=0.005)
    assert plan.hours == pytest.approx(plan.operations * plain.hours)
    assert sum(phase.images for phase in plan.phases) == plain.steps * plain.batch * 300
    assert (plain.phases, plain.operations) == ([], 1.0)
    assert "decodes" not in text_of(plan)
    assert "160 x 160 px, magnitude 1 to 5: 180 epochs, 230.0 M images decoded" in text_of(plan)


def test_phases__of_equal_compute_decode_more_images():
    """EfficientTrain++ with the GPU time of 200 epochs decodes 469 epochs of images."""
    options = ("phases=efficienttrain_pp", "epochs=469", "schedule.warmup_epochs=94", "trainer=ddp_8gpu")
    plan = planned("experiment=deit_small_progressive", *options)
    assert plan.equal_epochs == pytest.approx(200, abs=0.5)
    assert "decodes 2.3 times the images of 200 epochs at 224 x 224 px" in text_of(plan)
    assert max(plan.rates) == pytest.approx(4e-3, rel=0.01)
    assert plan.rates.index(max(plan.rates)) == pytest.approx(218, abs=2)  # 20 % of the compute


def text_of(plan):
    """Return the text of the plan's table on a wide terminal."""
    console = Console(width=300)
    with console.capture() as captured:
        console.print(plan_table(plan))
    return captured.get()


@pytest.mark.slow  # builds every network
def test_hours__in_every_header_equal_the_plan(monkeypatch):
    """The hours in the headers of the recipes follow from their MACs at the assumed share of an A100."""
    monkeypatch.setattr("vitrail.commands.plan.activation_bytes", lambda *_: 0)  # slow for large networks
    wrong = {}
    for path in sorted((PROJECT / "conf" / "experiment").glob("*.yaml")):
        text = " ".join(line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
        found = re.search(r"Expected: ([\d.]+) h on (\d+) A100", text)
        if found is None or path.stem.startswith(("cifar", "deit3_large", "lvvit_l")):
            continue  # no hours in the header, or slow to build
        nodes = int(found[2]) // 8
        plan = planned(f"experiment={path.stem}", "trainer=ddp_8gpu", f"trainer.num_nodes={nodes}")
        if plan.hours is not None and plan.hours != pytest.approx(float(found[1]), rel=0.06):
            wrong[path.stem] = (float(found[1]), round(plan.hours, 2))
    assert not wrong


def test_curve__draws_blocks():
    assert curve([0.0, 1.0, 8.0]) == " ▁█"
    assert len(curve([1.0] * 310)) == 60


def test_program__prints_the_plan_without_training(tmp_path):
    result = run("train.py", "experiment=lvvit_s", "trainer=ddp_8gpu", "plan=true", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in (
        "26.2 M parameters, 6.55 G MACs",
        "128 x 8 devices",
        "5.8 h, 46 GPU-hours",
        "still needed: data.root=",
    ):
        assert words in result.stdout
    assert not any((directory / "config.yaml").exists() for directory in run_directories(tmp_path))
