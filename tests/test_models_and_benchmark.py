"""src/list_models.py and src/benchmark.py as programs."""

import csv
import re

import pytest
import torch

from programs import error_of, run


def test_models__table_of_all(tmp_path):
    out = run("list_models.py", logs=tmp_path, COLUMNS="80").stdout
    assert not (tmp_path / "models").exists()  # a program that prints leaves no run directory
    row = next(line for line in out.splitlines() if line.strip().startswith("t2t_vit_14 "))
    assert row.split() == ["t2t_vit_14", "224", "21.5", "4.78", "197", "81.5", "(224)", "2"]
    names = {line.split()[0] for line in out.splitlines() if re.match(r"\s*(vit|deit|deit3|t2t|lvvit)", line)}
    assert {"t2t_vit_t_24", "lvvit_l", "deit3_base_patch16_224", "vit_nano", "vit"} <= names
    assert max(map(len, out.splitlines())) <= 80


def test_models__one_with_its_layers(tmp_path):
    out = run(
        "list_models.py", "model=lvvit", "model.name=lvvit_t", "image_size=[224,320]", "depth=1", logs=tmp_path
    ).stdout
    assert "224x320" in out
    assert "lvvit_t.in1k" in out
    assert "aux_head Linear in_features=240, out_features=1000" in out


def test_models__image_size_that_does_not_fit(tmp_path):
    failed = run("list_models.py", "model=deit_small", "image_size=225", logs=tmp_path)
    assert "deit_small_patch16_224 needs a multiple of its patch size 16" in error_of(failed)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_benchmark__two_sides(mode, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, 10))\n"
    )
    arguments = [f"mode={mode}", "model=vit_nano", f"against={tmp_path}/mine.py:tiny", "rounds=3", "batch_size=2"]
    out = run("benchmark.py", *arguments, f"csv={tmp_path}/speed.csv", logs=tmp_path).stdout
    assert "first / second" in out
    with (tmp_path / "speed.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["model"], theirs["model"]) == ("vit_nano", "mine:tiny")
    assert float(theirs["gmacs"]) == 3e-5  # 8 x 8 x 8 x 48 + 512 x 10 = 29,696
    assert int(theirs["parameters"]) == 8 * 49 + 513 * 10
    for row in (ours, theirs):
        assert float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
        assert float(row["images_per_second"]) == pytest.approx(2e3 / float(row["ms"]), rel=0.01)
        weights = 4 * int(row["parameters"]) / 2**20
        assert weights < float(row["peak_mb"]) < weights + 20
        assert 0 < float(row["share_of_peak"]) < 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mode=trian", "mode=trian: choose train, infer"),
        ("against=nothing", "against=nothing: neither a backbone that timm knows nor file.py:function"),
        ("against=/no/file.py:f", "there is no file /no/file.py"),
        ("device=cuda", "device=cuda: PyTorch sees no GPU here"),
        ("batchsize=2", "batchsize"),
    ],
)
def test_benchmark__refuses(argument, message, tmp_path):
    if argument == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in error_of(run("benchmark.py", "model=vit_nano", argument, logs=tmp_path))
