"""`tune=true` of src/benchmark.py: the largest batch, the settings it tries, and the command it prints."""

import json

import pytest

from greedy import LIMIT, write_greedy
from programs import error_of, run
from vitrail.commands import tune as command
from vitrail.commands.tune import largest_batch
from vitrail.runs.config import compose

TINY = ("tune=true", "trainer=cpu", "warmup=1", "steps=1")


@pytest.mark.parametrize(
    ("start", "fitting", "limit", "expected"),
    [
        (64, 300, 4096, 288),  # 64, 128, 256, not 512, not 384, not 320, 288
        (64, 64, 4096, 64),
        (64, 5, 4096, 4),  # not 64, 32, 16 and 8, but 4, not 6
        (64, 10_000, 512, 512),
        (64, 10_000, 40, 40),
        (64, 0, 4096, 0),
        (1, 1, 4096, 1),
        (6, 6, 4096, 6),
    ],
)
def test_largest_batch__to_an_eighth(start, fitting, limit, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= fitting

    assert largest_batch(fits, start, limit) == expected
    assert len(tried) == len(set(tried)) <= 10
    assert all(0 < size <= limit for size in tried)


def test_program__finds_the_batch_and_prints_the_command(tmp_path):
    arguments, variables = write_greedy(tmp_path)
    options = (*TINY, "data=digits", "data.batch_size=8", "grad_checkpointing=false", f"json={tmp_path}/best.json")
    result = run("benchmark.py", *arguments, *options, logs=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "train.py" in line]
    options = "--config-dir {0}/conf --allow greedy model=greedy trainer=cpu data=digits grad_checkpointing=false"
    assert line.endswith(f"train.py {options.format(tmp_path)} compile=null data.batch_size={LIMIT}")
    assert json.loads((tmp_path / "best.json").read_text())["batch_size"] == LIMIT


@pytest.mark.slow
def test_tune__memory_limits_the_batch_on_a_cpu_and_checkpointing_allows_more():
    config = compose("benchmark_train", [*TINY, "model=deit_nano", "data.batch_size=8", "memory=0.02", "largest=64"])
    trials = command.tune(config)
    found = {trial.settings["grad_checkpointing"]: trial.figures for trial in trials}
    assert 8 <= found[False].batch_size < found[True].batch_size
    assert all(figures.peak_memory <= 0.02 * 2**30 for figures in found.values())
    assert trials[0].speed >= trials[1].speed


@pytest.mark.parametrize(
    ("overrides", "choices"),
    [
        (["model=deit_nano"], {"compile": [None], "grad_checkpointing": [False, True], "kernels.channels_last": []}),
        (["model=vit_nano", "compile=default", "grad_checkpointing=true"], {"kernels.channels_last": [False, True]}),
    ],
)
def test_choices__those_that_apply_and_that_the_command_line_leaves_open(overrides, choices):
    assert command.Tuner(compose("benchmark_train", [*TINY, *overrides])).choices == choices


def test_tune__nothing_fits(tmp_path):
    options = ("model=deit_nano", "data.batch_size=2", "memory=0.0001", "grad_checkpointing=true")
    error = error_of(run("benchmark.py", *TINY, *options, logs=tmp_path))
    assert error == "error: data.batch_size=2: no batch size fits into memory with any setting."
