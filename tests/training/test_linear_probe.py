"""Linear probes: the grid of learning rates, the choice on held-out images, the cache, and exact resume."""

import csv

import pytest
import torch
from torch.nn import functional as F

import vitrail
from assembly import assemble
from resuming import assert_same, copy_every_save, last_checkpoint, new_folder
from vitrail.data.sampling import EpochSampler
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.objectives import CosubLoss, FeatureDistillation
from vitrail.training import LinearProbe, ProbeSettings

pytestmark = pytest.mark.thorough

PROBE = (
    *("experiment=linear_probe", "data=digits", "data.batch_size=64", "model=deit_nano", "trainer=cpu", "epochs=2"),
    *("probe.lr_factors=[0.01,0.1,1]", "optimizer.lr=5", "data.image_size=8", "+model.depth=2"),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights whose features tell the digits apart: random, but not close to zero."""
    torch.manual_seed(0)
    model = create_model("deit_nano", 10, 8, depth=2)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(model.state_dict(), path)
    return path


def prepare(folder, weights, *options):
    return assemble(new_folder(folder), *PROBE, f"init_from={weights}", *options)


def fit(folder, weights, *options, ckpt=None, copies=None):
    trainer, module, data = prepare(folder, weights, *options)
    if copies is not None:
        copy_every_save(trainer.strategy.checkpoint_io, copies)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return module, data


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def cached(tmp_path_factory, weights):
    """A finished probe on cached features: folder, module and data."""
    folder = tmp_path_factory.mktemp("cached") / "run"
    return folder, *fit(folder, weights, "probe=linear_cached")


def test_classifiers__equal_plain_sgd(cached, weights, tmp_path):
    _, module, data = cached
    _, fresh, _ = prepare(tmp_path / "run", weights, "probe=linear_cached")  # the same seed: the same initial weights
    steps, features, labels = len(data.train) // 64, data.train.features, data.train.labels
    for factor, trained, initial in zip((0.01, 0.1, 1.0), module.classifiers, fresh.classifiers, strict=True):
        optimizer = torch.optim.SGD(initial.parameters(), lr=5 * 64 / 256 * factor, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
        sampler = EpochSampler(len(data.train), data.seed, True, batch_size=64)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for batch in torch.tensor([draw.sample for draw in sampler]).split(64):
                optimizer.zero_grad()
                F.cross_entropy(initial(features[batch]), labels[batch]).backward()
                optimizer.step()
                cosine.step()
        torch.testing.assert_close(trained.weight, initial.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained.bias, initial.bias, rtol=1e-4, atol=1e-5)


def test_choice__is_made_on_held_out_images(cached):
    folder, module, data = cached
    train, held_out = set(data.train.keys), set(data.held_out.keys)
    assert (len(train), len(held_out)) == (1294, 144)
    assert not train & held_out
    for row in rows(folder):
        grid = {lr: row[f"held_out/top1_lr_{lr:g}"] for lr in (0.05, 0.5, 5.0)}
        assert grid[row["held_out/lr"]] == max(grid.values()) == row["held_out/top1"]
        assert len(set(grid.values())) > 1
    assert max(row["val/top1"] for row in rows(folder)) > 30  # far above chance, with random features
    chosen = module.classifiers[module.chosen]
    assert module.lrs[module.chosen] == rows(folder)[-1]["held_out/lr"]
    correct = (chosen(data.val.features).argmax(1) == data.val.labels).float().mean()
    assert 100 * float(correct) == pytest.approx(rows(folder)[-1]["val/top1"], abs=1e-3)


def test_best_checkpoint__contains_the_chosen_classifier(cached):
    folder, _, data = cached
    best = max(rows(folder), key=lambda row: row["held_out/top1"])
    trained = vitrail.load_run(folder / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        logits = torch.cat([trained.model(item.image[None]) for item in map(data.val.images.__getitem__, range(359))])
    correct = (logits.argmax(1) == data.val.labels).float().mean()
    assert 100 * float(correct) == pytest.approx(best["val/top1"], abs=1e-3)


def test_backbone__stays_as_it_was(cached, weights):
    _, module, _ = cached
    assert not module.train().model.training
    for name, value in torch.load(weights, weights_only=True).items():
        assert name.startswith("head.") or torch.equal(module.model.state_dict()[name], value), name


def test_cache__gives_the_same_training(cached, weights, tmp_path):
    folder, module, _ = cached
    other, _ = fit(tmp_path / "run", weights, "augment=none", "augment.crop_pct=0.875")
    for one, two in zip(module.classifiers, other.classifiers, strict=True):
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-3, atol=1e-4)
    for one, two in zip(rows(folder), rows(tmp_path / "run"), strict=True):
        assert one["held_out/top1"] == pytest.approx(two["held_out/top1"], abs=1)


@pytest.mark.parametrize("probe", ["linear", "linear_cached"])
def test_resume__is_exact(probe, weights, tmp_path):
    options = (f"probe={probe}", "trainer.limit_train_batches=4", "callbacks.preemption.minutes=0")
    copies = new_folder(tmp_path / "copies")
    fit(tmp_path / "whole", weights, *options, copies=copies)
    for number in (3, 5):  # within the first epoch, and after its validation
        ckpt = copies / f"{number:02d}.ckpt"
        fit(tmp_path / f"{number}", weights, *options, f"resume={tmp_path / 'whole'}", ckpt=ckpt)
        expected, found = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / f"{number}")
        for part in ("state_dict", "optimizer_states", "global_step", "chosen_classifier"):
            assert_same(found[part], expected[part], part)
        assert rows(tmp_path / f"{number}")[-1]["held_out/lr"] == rows(tmp_path / "whole")[-1]["held_out/lr"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("callbacks.ema={_target_: vitrail.training.EMA}",), "callbacks.ema: a linear probe cannot be combined with"),
        (("phases=efficienttrain",), "phases: a linear probe cannot be combined with phases of image size"),
        (("grad_checkpointing=true",), "grad_checkpointing: a linear probe cannot be combined with"),
        (("strategy=fsdp",), "strategy: a linear probe cannot be combined with FSDP; set strategy=ddp"),
        (("trainer.limit_val_batches=0",), "trainer.limit_val_batches: a linear probe cannot be combined with no"),
        (("probe=linear_cached", "augment=crop"), "probe.cache=true: cached features are those of one view"),
        (("probe=linear_cached", "mixing=mixup_08"), "mixing: a linear probe cannot be combined with mixing, as"),
        (("init_from=null",), "init_from: not set, so the linear probe's backbone would have random weights"),
        (("probe.lr_factors=[1,1]",), r"probe.lr_factors=\[1, 1\]: must be different numbers"),
        (("probe.held_out=1",), "probe.held_out=1: must be a number above 0 and below 1"),
    ],
)
def test_unsuitable_settings__are_refused(options, sentence, weights, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        prepare(tmp_path / "run", weights, *options)


@pytest.mark.parametrize("objective", [CosubLoss(), FeatureDistillation()])
def test_objective__sees_class_logits_only(objective):
    name = type(objective).__name__
    with pytest.raises(ConfigError, match=f"objective: {name} needs more than the class logits of one pass"):
        LinearProbe(create_model("deit_nano", 10, 8, depth=1), objective, 10, ProbeSettings([1.0]))
