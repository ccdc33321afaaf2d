"""The linear schedule against mmcv's formula."""

import logging

import pytest
import torch

from vitrail.training import LinearSchedule


def rates(schedule, epochs, steps, lr=6e-5):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule.build(optimizer, epochs, steps)
    found = []
    for step in range(epochs * steps + 1):
        schedule.advance(scheduler, step // steps, step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_published_values__at_every_step_of_a_short_training():
    found = rates(LinearSchedule(warmup_steps=15), 16, 100)
    for step, rate in enumerate(found):
        regular = 6e-5 * (1 - step / 1600)
        warm = regular * (1 - (1 - step / 15) * (1 - 1e-6)) if step < 15 else regular
        assert rate == pytest.approx(warm, rel=1e-9, abs=1e-20)
    assert found[0] == pytest.approx(6e-11)
    assert found[-1] == 0


def test_power_and_end():
    found = rates(LinearSchedule(warmup_steps=0, power=2.0, min_lr=1e-6), 1, 10, lr=1e-3)
    assert found[5] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.25)
    assert found[10] == pytest.approx(1e-6)


def test_warmup__is_shortened_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        found = rates(LinearSchedule(warmup_steps=1500), 1, 8, lr=1.0)
    assert "schedule.warmup_steps=1500 does not fit into 8 steps: warming up for 4" in caplog.text
    assert found[4] == pytest.approx(0.5)
