"""The parts of a step, by a clock that moves by a known amount in each part."""

import lightning as L
import pytest
import torch

from small_training import build, trainer
from vitrail.training import EMA, CosineSchedule, OptimizerFactory
from vitrail.training import step_timer as timing
from vitrail.training.step_timer import PARTS, StepTimer

TAKES = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 8.0, "average": 16.0, "other": 32.0}


class Clock(L.Callback):
    """Time in seconds that moves in each part of a step; a twentyfold amount in the batches that do not count."""

    def __init__(self, warmup, steps):
        self.now, self.counted, self.batch = 100.0, range(warmup, warmup + steps), 0

    def move(self, part):
        self.now += TAKES[part] * (1 if self.batch in self.counted else 20)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.move("other")
        self.batch = batch_idx + 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_parts__by_hand(accumulated, tmp_path, monkeypatch):
    clock, timer = Clock(2, 4), StepTimer(2, 4)
    monkeypatch.setattr(timing, "moment", lambda _: clock.now)
    module, data = build(optimizer=OptimizerFactory(), schedule=CosineSchedule())
    average = EMA()

    def moving(owner, name, part):
        function = getattr(owner, name)

        def moved(*args, **kwargs):
            result = function(*args, **kwargs)
            clock.move(part)
            return result

        monkeypatch.setattr(owner, name, moved)

    moving(module, "on_after_batch_transfer", "data")
    moving(module, "training_step", "forward")
    moving(torch.Tensor, "backward", "backward")
    moving(module, "on_before_optimizer_step", "optimizer")
    moving(average, "on_train_batch_end", "average")
    options = {"accumulate_grad_batches": accumulated, "limit_train_batches": 8, "limit_val_batches": 0}
    fitting = trainer(tmp_path, [average, clock], max_epochs=1, **options)
    timer.attach(fitting)
    fitting.fit(module, datamodule=data)
    expected = {**TAKES, "optimizer": TAKES["optimizer"] / accumulated}
    assert timer.seconds() == pytest.approx({part: expected[part] for part in PARTS})


def test_moments__on_the_cpu_are_seconds():
    start = timing.moment(torch.device("cpu"))
    end = timing.moment(torch.device("cpu"))
    assert 0 <= timing.seconds_between(start, end) < 60
