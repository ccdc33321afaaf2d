"""`make benchmark-gpu` as a dry run on the CPU, with nothing installed but what it may need."""

import argparse
import csv
import json
import runpy

import pytest

from programs import PROJECT, run_python

# The packages that are missing where a GPU is borrowed for a while.
ABSENT = ("wandb", "skimage", "sklearn", "pandas", "optuna", "tensorboard", "mlflow", "onnx", "submitit", "pyarrow")
START = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv = {argv}
sys.path[:0] = [{benchmarks!r}, {src!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def dry_run(folder, *options):
    argv = [str(PROJECT / "benchmarks" / "gpu.py"), "--device=cpu", f"--csv={folder}/gpu.csv", *options]
    code = START.format(absent=ABSENT, argv=argv, benchmarks=str(PROJECT / "benchmarks"), src=str(PROJECT / "src"))
    return run_python("-c", code, folder=folder)


@pytest.mark.thorough
def test_dry_run__measures_all_cases_and_appends_rows(tmp_path):
    columns = (PROJECT / "results" / "gpu.csv").read_text().splitlines()[0]
    (tmp_path / "gpu.csv").write_text(f"{columns}\n")
    result = dry_run(tmp_path, f"--json={tmp_path}/gpu.json")
    assert result.returncode == 0, result.stderr
    assert "left out" not in result.stdout, result.stdout
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12  # four networks: synthetic with the bare loop beside it, and packed
    assert [row["loop"] for row in rows].count("bare") == 4
    for row in rows:
        assert float(row["images_per_second"]) == pytest.approx(4e3 / float(row["ms_per_step"]), rel=0.01, abs=0.1)
        assert row["command"].startswith("python benchmarks/gpu.py --device=cpu")
        assert row["commit"]
        assert row["share_of_peak"] == ""  # a CPU's is not known
    figures = json.loads((tmp_path / "gpu.json").read_text())
    for model in ("deit_small", "lvvit_s", "t2t_vit_14", "deit_base"):
        assert figures[f"{model}_eager_synthetic_time_over_bare"] > 0
        packed, synthetic = (figures[f"{model}_eager_{data}_images_per_second"] for data in ("packed", "synthetic"))
        assert figures[f"{model}_eager_packed_over_synthetic"] == pytest.approx(packed / synthetic, rel=1e-3)


@pytest.mark.thorough
def test_cases__are_listed_if_there_is_no_time_for_them(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    run = runpy.run_path(str(PROJECT / "benchmarks" / "gpu.py"))["run"]
    assert run(argparse.Namespace(device="cpu", minutes=0, csv=tmp_path / "gpu.csv")) == {}
    assert capsys.readouterr().out.count("left out: no time left") == 8
    assert not (tmp_path / "gpu.csv").exists()
