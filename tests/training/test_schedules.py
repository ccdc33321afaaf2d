"""The schedule equals recorded learning rates of the official runs, also in a real Trainer."""

import json
import math

import lightning as L
import pytest
import torch
from torch import nn

from programs import PROJECT
from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.sources import Digits
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.training import CosineSchedule, ImageClassifier, OptimizerFactory

RECORDED = json.loads((PROJECT / "tests" / "peers" / "lr_schedules.json").read_text())


def optimizer(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("name", RECORDED)
def test_cosine__equals_official_schedules(name):
    case = RECORDED[name]
    built = optimizer(case["peak"])
    schedule = CosineSchedule(
        case["warmup_epochs"], case["warmup_lr"], case["min_lr"], case["cooldown_epochs"], late=case["late"]
    )
    scheduler = schedule.build(built, len(case["lr_of_epoch"]), steps_per_epoch=10)
    for epoch, expected in enumerate(case["lr_of_epoch"]):
        schedule.advance(scheduler, epoch, 10 * epoch)
        assert built.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-7)


def test_warmup_prefix__cosine_starts_at_the_peak():
    """Google's schedule: linear from 0, then half a cosine over the remaining steps."""
    schedule = CosineSchedule(2, 0.0, 0.0, per_step=True, warmup_prefix=True)
    built = optimizer(1.0)
    scheduler = schedule.build(built, 10, steps_per_epoch=5)
    for step in range(50):
        schedule.advance(scheduler, step // 5, step)
        expected = step / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
        assert built.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9)


def test_late__requires_a_per_epoch_schedule():
    with pytest.raises(ConfigError, match=r"schedule.epoch_lag=true: needs a per-epoch schedule"):
        CosineSchedule(late=True, per_step=True)


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("per_step", [False, True])
def test_trainer__steps_the_schedule(per_step, accumulate, tmp_path):
    """In four epochs of four batches, each batch's learning rate follows the formula, per epoch or per step."""
    schedule = CosineSchedule(1, 1e-6, 1e-5, cooldown_epochs=1, per_step=per_step)
    data = ImageDataModule(Digits(), augment=Augmentation(enabled=False), image_size=8, batch_size=8, num_workers=0)
    model = create_model("vit_nano", 10, 8, depth=1)
    module = ImageClassifier(model, CrossEntropy(), 10, OptimizerFactory(lr=1e-3, lr_scaling="none"), schedule)
    rates = Rates()
    trainer = L.Trainer(
        max_epochs=4, limit_train_batches=4, limit_val_batches=0, accumulate_grad_batches=accumulate, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[rates],
        use_distributed_sampler=False, default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    reference = CosineSchedule(1, 1e-6, 1e-5, 1, per_step)
    per_epoch = 4 // accumulate
    built = optimizer(1e-3)
    scheduler = reference.build(built, 4, per_epoch)
    expected = []
    for batch in range(16):
        scheduler.step(batch // 4)
        scheduler.step_update(batch // 4 * per_epoch + batch % 4 // accumulate)
        expected.append(built.param_groups[0]["lr"])
    assert rates.rates == pytest.approx(expected, rel=1e-9)
    assert rates.rates[-1] == pytest.approx(1e-5)


def test_warmup__shortened_with_a_warning(caplog):
    scheduler = CosineSchedule(warmup_epochs=5).build(optimizer(1.0), 4, 10)
    assert scheduler.warmup_t == 2
    assert "schedule.warmup_epochs=5 does not fit into 4 epochs" in caplog.text


def test_cooldown__as_long_as_the_training_is_refused():
    with pytest.raises(ConfigError, match=r"schedule.cooldown_epochs=4: leaves none of the 4 epochs for the cosine"):
        CosineSchedule(cooldown_epochs=4).build(optimizer(1.0), 4, 10)


def test_warmup_reaches_peak__needs_a_schedule_per_step():
    with pytest.raises(ConfigError, match=r"schedule.warmup_reaches_peak=true: needs schedule.per_step=true"):
        CosineSchedule(warmup_reaches_peak=True, per_step=True)
