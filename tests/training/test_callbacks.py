"""Speed figures with a clock that the test sets, and the line that is logged after each epoch."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from small_training import build, trainer
from vitrail.training import CosineSchedule, EpochReport, IntervalProgressBar, OptimizerFactory, SpeedMonitor, callbacks
from vitrail.types import Batch


class Clock:
    """Time in seconds that moves only when the test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(callbacks.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Recorded:
    """A module that keeps what is logged."""

    device = torch.device("cpu")

    def __init__(self):
        self.logged = []

    def log_dict(self, values, **options):
        self.logged.append(values)


def run_epoch(monitor, trainer, module, clock, steps):
    """Run batches of 4 images; each step is (seconds of waiting, seconds of computing)."""
    monitor.on_train_epoch_start(trainer, module)
    batch = Batch(torch.zeros(4, 3, 2, 2), torch.zeros(4), [])
    for number, (wait, work) in enumerate(steps):
        clock.now += wait
        monitor.on_train_batch_start(trainer, module, batch, number)
        clock.now += work
        monitor.on_train_batch_end(trainer, module, None, batch, number)
    clock.now += 1000  # validation
    monitor.on_train_epoch_end(trainer, module)


@pytest.mark.parametrize("world_size", [1, 3])
def test_speed__by_hand(world_size, monkeypatch):
    """12 images per device in 0.5 + 1 + 0 + 2 + 0.5 + 1 = 5 s, of which it waited 1 s; validation is not counted."""
    clock, module, monitor = Clock(monkeypatch), Recorded(), SpeedMonitor()
    trainer = SimpleNamespace(world_size=world_size)
    monitor.on_train_start(trainer, module)
    clock.now += 50  # before the first epoch
    run_epoch(monitor, trainer, module, clock, [(0.5, 1), (0, 2), (0.5, 1)])
    run_epoch(monitor, trainer, module, clock, [(0, 2), (6, 0)])
    assert module.logged == [
        {"speed/images_per_second": pytest.approx(12 * world_size / 5), "speed/data_wait": pytest.approx(20)},
        {"speed/images_per_second": pytest.approx(8 * world_size / 8), "speed/data_wait": pytest.approx(75)},
    ]


def test_speed__by_the_devices_time(monkeypatch):
    """The host runs 3 steps ahead of a device that waits 1 s before each of 4 steps of 2 s."""

    class Event:
        """Event that the device reaches at `time`, in ms."""

        recorded, reached = [], 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            number = len(self.recorded)  # start, then stop and start of each step
            self.time = 1000 * (number // 2 * 3 + number % 2)
            self.recorded.append(self)

        def query(self):
            return self.time <= Event.reached

        def elapsed_time(self, other):
            assert max(self.time, other.time) <= Event.reached
            return other.time - self.time

        def synchronize(self):
            Event.reached = max(Event.reached, self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = callbacks.DeviceClock()
    clock.start()
    for step in range(4):
        clock.stop()
        Event.reached = max(0, 3000 * (step - 3))
        clock.start()
    assert clock.read() == (4, 12)


def test_speed__of_an_epoch_without_batches(monkeypatch):
    clock, module, monitor = Clock(monkeypatch), Recorded(), SpeedMonitor()
    run_epoch(monitor, SimpleNamespace(world_size=1), module, clock, [])
    assert module.logged == [{"speed/images_per_second": 0, "speed/data_wait": 0}]


def test_speed__counts_all_accumulated_batches(tmp_path):
    """4 batches of 16 images in 2 optimiser steps: 64 images."""
    module, data = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
    monitor = SpeedMonitor()
    limits = {"limit_train_batches": 4, "limit_val_batches": 1, "accumulate_grad_batches": 2}
    fit = trainer(tmp_path, [monitor], max_epochs=1, **limits)
    fit.fit(module, datamodule=data)
    assert fit.global_step == 2
    assert monitor.images == 64
    _, seconds = monitor.clock.read()
    assert fit.callback_metrics["speed/images_per_second"].item() == pytest.approx(64 / seconds, rel=1e-5)
    assert 0 < fit.callback_metrics["speed/data_wait"].item() < 100


def reported(caplog, is_first=True, **metrics):
    state = SimpleNamespace(is_global_zero=is_first, current_epoch=1, max_epochs=10, callback_metrics=metrics)
    with caplog.at_level("INFO", logger="vitrail"):
        EpochReport().on_train_epoch_end(state, None)
    return [record.getMessage() for record in caplog.records]


METRICS = {
    "train/loss": torch.tensor(1.23456),
    "train/lr": torch.tensor(1e-3),
    "val/top1": torch.tensor(50.0),
    "val/top1_ema": torch.tensor(25.125),
    "speed/images_per_second": torch.tensor(1234.5678),
    "val/top5": torch.tensor(99.0),
}


def test_progress__metrics_are_collected_once_per_interval_and_after_the_last_batch(monkeypatch):
    """Ten batches of half a second, drawn every two seconds."""
    now, drawn = [100.0], []
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", lambda *arguments: drawn.append(arguments[-1]))
    monkeypatch.setattr(RichProgressBar, "on_validation_batch_end", lambda *arguments: drawn.append(arguments[-2]))
    monkeypatch.setattr(IntervalProgressBar, "total_train_batches", 10)
    monkeypatch.setattr(IntervalProgressBar, "total_val_batches_current_dataloader", 10)
    bar = IntervalProgressBar(interval=2)
    for end in (bar.on_train_batch_end, bar.on_validation_batch_end):
        drawn.clear()
        for batch in range(10):
            end(None, None, None, None, batch)
            now[0] += 0.5
        assert drawn == [0, 4, 8, 9]
        now[0] += 2


def test_report__one_line_with_all_metrics(caplog):
    (line,) = reported(caplog, **METRICS)
    assert line == "epoch 2/10, loss 1.2346, top-1 50.00 %, EMA 25.12 %, lr 1.00e-03, 1,235 images/s"


def test_report__leaves_out_what_was_not_measured(caplog):
    assert reported(caplog, **{"train/loss": torch.tensor(2.0)}) == ["epoch 2/10, loss 2.0000"]


def test_report__only_from_the_first_process(caplog):
    assert reported(caplog, is_first=False, **METRICS) == []
