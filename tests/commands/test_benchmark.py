"""src/benchmark.py as a program, and its figures computed from known times and sizes."""

import csv

import pytest
import torch
from hydra import compose, initialize_config_dir

from programs import PROJECT, error_of, run
from vitrail.commands import benchmark

MINE = """
from torch import nn
def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, 10))
"""
MACS = 8 * 8 * 8 * 48 + 512 * 10  # 8 x 8 places, 8 filters of 4 x 4 x 3; linear layer
PARAMETERS = 8 * 49 + 513 * 10


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_benchmark__two_backbones(mode, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    arguments = [f"mode={mode}", "model=vit_nano", f"against={tmp_path}/mine.py:tiny", "rounds=3", "batch_size=2"]
    out = run("benchmark.py", *arguments, f"csv={tmp_path}/speed.csv", logs=tmp_path).stdout
    assert "first / second" in out
    with (tmp_path / "speed.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["model"], theirs["model"]) == ("vit_nano", "mine:tiny")
    assert float(theirs["gmacs"]) == round(MACS / 1e9, 6)
    assert int(theirs["parameters"]) == PARAMETERS
    for row in (ours, theirs):
        assert 0 < float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
        assert float(row["images_per_second"]) == pytest.approx(2e3 / float(row["ms"]), rel=0.01)
        weights = 4 * int(row["parameters"]) / 2**20
        assert weights < float(row["peak_mb"]) < weights + 20


@pytest.mark.parametrize(("mode", "passes"), [("train", 3), ("infer", 1)])
def test_benchmark__figures_by_hand(mode, passes, tmp_path, monkeypatch):
    """Steps of 0.2, 0.1 and 0.4 s on a device of 1 MFLOP/s; a backward pass counts as two forward passes."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(benchmark, "_time_interleaved", lambda *_: [[0.002, 0.001, 0.004], [0.2, 0.1, 0.4]])
    monkeypatch.setattr(benchmark, "_matmul_peak", lambda *_: 1e9)
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        options = ("model=vit_nano", f"against={tmp_path}/mine.py:tiny", "batch_size=4", f"mode={mode}", "device=cpu")
        config = compose("benchmark", [*options, f"csv={tmp_path}/speed.csv"])
    _, row = benchmark.benchmark(config)
    assert (row["ms"], row["ms_min"], row["ms_max"]) == (200, 100, 400)
    assert row["images_per_second"] == 4 / 0.2
    assert row["share_of_peak"] == pytest.approx(2 * MACS * 4 * passes / 0.2 / 1e9, abs=5e-5)
    assert (row["batch_size"], row["image"], row["mode"]) == (4, "32x32", mode)
    benchmark.benchmark(config)
    with (tmp_path / "speed.csv").open() as file:
        assert [line["model"] for line in csv.DictReader(file)] == ["vit_nano", "mine:tiny"] * 2


def test_rounds__alternate_and_the_first_two_are_not_counted():
    calls = []
    seconds = benchmark._time_interleaved(
        [lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, count=2, device=torch.device("cpu")
    )
    assert "".join(calls) == "aabb" * 5
    assert [len(times) for times in seconds] == [3, 3]


def test_tensors__floating_ones_in_nested_outputs():
    one, two = torch.zeros(1), torch.zeros(2)
    assert [id(tensor) for tensor in benchmark._tensors((one, [None, (two, torch.arange(3))]))] == [id(one), id(two)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mode=trian", "mode=trian: choose train, infer"),
        ("against=nothing", "against=nothing: "),
        ("against=/no/file.py:f", "/no/file.py"),
        ("device=cuda", "device=cuda: PyTorch sees no GPU here"),
        ("batchsize=2", "batchsize"),
    ],
)
def test_benchmark__invalid_settings_are_refused(argument, message, tmp_path):
    if argument == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in error_of(run("benchmark.py", "model=vit_nano", argument, logs=tmp_path))
