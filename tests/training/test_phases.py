"""A training in phases: sizes, optimiser state, learning rate, compilation and token labels."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from small_training import trainer
from vitrail.data import Augmentation, ImageDataModule, MixupCutMix, PhaseCalendar
from vitrail.data.mixing import MixToken
from vitrail.data.sources import Digits
from vitrail.models import create_model
from vitrail.models.any_size import allow_any_size
from vitrail.objectives import CrossEntropy, TokenLabelingLoss
from vitrail.training import EMA, CosineSchedule, ImageClassifier, OptimizerFactory, PhaseReport

pytestmark = pytest.mark.thorough

CALENDAR = [
    {"share": 0.5, "image_size": 8, "magnitude": 1},
    {"share": 0.25, "image_size": 12},
    {"share": 0.25, "image_size": 16},
]


def phased(phases, name="deit_nano", objective=None, label_maps=None, **kwargs):
    """Return a module and data of 16 pixels that train in phases."""
    torch.manual_seed(0)
    arguments = {"token_head": True} if label_maps else {}
    model = allow_any_size(create_model(name, 10, 16, depth=2, **arguments))
    data = ImageDataModule(Digits(), Augmentation(), 16, batch_size=64, num_workers=0, label_maps=label_maps)
    data.set_phases(phases)
    optimizer = OptimizerFactory(lr=1e-3, lr_scaling="none")
    kwargs = {"optimizer": optimizer, "schedule": CosineSchedule(1), **kwargs}
    return ImageClassifier(model, objective or CrossEntropy(0.1), 10, phases=phases, **kwargs), data


def fit_phases(epochs=4, **kwargs):
    return PhaseCalendar(CALENDAR, multiple=4, **kwargs).fit((16, 16), epochs)


class Recorder(PhaseReport):
    """Records the size of every training and validation batch, the learning rates, and the shapes of the state."""

    def __init__(self, phases):
        super().__init__(phases)
        self.sizes, self.validated, self.rates, self.shapes = [], set(), [], set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.sizes.append(batch.image.shape[-1])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.add(batch.image.shape[-1])

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        moments = trainer.optimizers[0].state[pl_module.model.pos_embed]
        ema = next(item for item in trainer.callbacks if isinstance(item, EMA))
        tensors = (pl_module.model.pos_embed, moments["exp_avg"], moments["exp_avg_sq"], ema.average["pos_embed"])
        self.shapes |= {tuple(tensor.shape) for tensor in tensors}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_training__sizes_change_and_the_state_keeps_its_shape(name, tmp_path, caplog):
    caplog.set_level("INFO")
    phases = fit_phases()
    optimizer = OptimizerFactory(name, lr=1e-3, lr_scaling="none")
    module, data = phased(phases, mixing=MixupCutMix(), optimizer=optimizer)
    recorder, before = Recorder(phases), copy.deepcopy(module.model.pos_embed.detach())
    fit = trainer(tmp_path, [recorder, EMA(0.9)], max_epochs=4, limit_train_batches=2)
    fit.fit(module, datamodule=data)
    assert recorder.sizes == [8, 8, 8, 8, 12, 12, 16, 16]
    assert recorder.validated == {16}
    assert recorder.shapes == {(1, 1 + 16, 64)}
    assert (module.model.pos_embed != before).all()
    assert fit.callback_metrics["train/image_size"] == 16
    texts = [record.message for record in caplog.records if "px" in record.message]
    assert texts == [
        "8 x 8 px, RandAugment magnitude 1, until epoch 2",
        "12 x 12 px, until epoch 3",
        "16 x 16 px, until epoch 4",
    ]


def test_report__refuses_images_of_another_phase(tmp_path):
    phases = fit_phases()
    module, data = phased(phases)
    data.phases = None
    fit = trainer(tmp_path, [PhaseReport(phases)], max_epochs=1)
    with pytest.raises(AssertionError, match=r"images of \(16, 16\) pixels in a phase of \(8, 8\)"):
        fit.fit(module, datamodule=data)


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("by", ["epochs", "compute"])
@pytest.mark.sample(3)
def test_lr__follows_epochs_or_compute(by, per_step, tmp_path):
    """By compute, an epoch at half the side advances the cosine by a quarter as much."""
    phases = fit_phases(8, by=by)
    schedule = CosineSchedule(0, per_step=per_step)
    module, data = phased(phases, schedule=schedule)
    recorder = Recorder(phases)
    trainer(
        tmp_path, [recorder, EMA(0.9)], max_epochs=8, limit_train_batches=2, limit_val_batches=0
    ).fit(module, datamodule=data)  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = schedule.build(optimizer, 8, 2)
    expected, work = [], {8: 0.25, 12: 0.5625, 16: 1.0}
    costs = [work[phases.at(epoch).size[0]] if by == "compute" else 1.0 for epoch in range(8)]
    for step in range(16):
        done = sum(costs[: step // 2]) + (step % 2) / 2 * costs[step // 2]
        position = 8 * done / sum(costs)
        if per_step:
            scheduler.step_update(2 * position)
        else:
            scheduler.step(8 * sum(costs[: step // 2]) / sum(costs))
        expected.append(optimizer.param_groups[0]["lr"])
    assert recorder.rates == pytest.approx(expected)


def test_compile__once_for_each_size_and_mode(tmp_path, monkeypatch):
    """Three sizes in training and one in evaluation: four graphs, none with a size that is left open."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic, **_: compile_(function, backend=counter, dynamic=dynamic)
    )
    phases = fit_phases()
    module, data = phased(phases, compile_mode="default")
    trainer(tmp_path, max_epochs=4, limit_train_batches=2, limit_val_batches=1).fit(module, datamodule=data)
    assert counter.frame_count == 4


class Grids(PhaseReport):
    """Records the number of token targets and the box of MixToken of every batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        grid = pl_module.token_grid(batch.image)
        targets = pl_module.targets(batch, pl_module.objective, 10, grid)
        self.found = [*getattr(self, "found", []), (grid, targets.tokens.base.shape[1])]
        top, left, bottom, right = batch.mix.token_box.tolist()
        assert 0 <= top <= bottom <= grid[0]
        assert 0 <= left <= right <= grid[1]


@pytest.mark.parametrize("name", ["deit_nano", "deit_nano_distilled"])
def test_token_labels__follow_the_grid_of_each_phase(name, maps, tmp_path):
    phases = fit_phases()
    module, data = phased(phases, name, TokenLabelingLoss(), maps, mixing=MixToken())
    recorder = Grids(phases)
    fit = trainer(tmp_path, [recorder], max_epochs=4, limit_train_batches=1, limit_val_batches=1)
    fit.fit(module, datamodule=data)
    assert recorder.found == [((2, 2), 4), ((2, 2), 4), ((3, 3), 9), ((4, 4), 16)]
    assert torch.isfinite(fit.callback_metrics["train/loss"])
