"""The benchmarks run and write their figures."""

import json

import numpy as np
import pytest
from PIL import Image

from programs import PROJECT, run_python
from vitrail.data.segmentation.values import read_mask

BENCHMARKS = sorted(
    path.stem
    for path in (PROJECT / "benchmarks").glob("*.py")
    if path.stem not in ("figures", "jpegs", "pictures", "recipes")
)


def benchmark(name, *options, folder):
    return run_python(str(PROJECT / "benchmarks" / f"{name}.py"), *options, folder=folder)


@pytest.mark.thorough
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark__starts_and_writes_json_if_asked(name, tmp_path):
    result = benchmark(name, "--help", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--json" in result.stdout


@pytest.mark.thorough
def test_overhead__writes_its_figures(tmp_path):
    file = tmp_path / "figures.json"
    result = benchmark("overhead", "--steps=2", "--rounds=1", "--batch=8", f"--json={file}", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert set(figures) == {"overhead", "bare_step_ms"}
    assert all(value > 0 for value in figures.values())


@pytest.mark.thorough
def test_demo_segmentation__masks_cover_the_digits_and_intervals_are_those_of_student(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import demo_segmentation

    root = demo_segmentation.write_masks(tmp_path, 0.01)
    labels = set()
    for path in sorted((root / "masks" / "train").iterdir()):
        mask = read_mask(path)
        image = np.asarray(Image.open(root / "images" / "train" / path.name)).max(-1)
        (_, label), (_, covered) = np.unique(mask, return_counts=True)
        labels.add(int(label) - 1)
        assert 0.01 < covered / mask.size < 0.3
        assert image[mask > 0].mean() > image[mask == 0].mean() + 30, "digits are bright"
    assert len(labels) > 5
    assert labels <= set(range(10))
    assert demo_segmentation.interval([1, 2, 3]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)


@pytest.mark.slow
def test_against_timm__divides_the_times_of_whole_programs(tmp_path):
    checkout, file = tmp_path / "timm", tmp_path / "figures.json"
    checkout.mkdir()
    (checkout / "train.py").write_text("import time; time.sleep(1)")
    result = benchmark(
        "against_timm",
        f"--timm={checkout}",
        "--images=32",
        "--epochs=1",
        "--rounds=1",
        f"--json={file}",
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["wall_over_timm"] == pytest.approx(
        figures["vitrail_wall_seconds"] / figures["timm_wall_seconds"], 1e-4
    )
    assert 1 < figures["timm_wall_seconds"] < 3
    assert figures["timm_cpu_seconds"] < 1 < figures["vitrail_cpu_seconds"]


def test_against_timm__reports_a_folder_without_the_program(tmp_path):
    result = benchmark("against_timm", f"--timm={tmp_path}", folder=tmp_path)
    assert result.returncode == 2
    assert f"--timm {tmp_path}: contains no train.py" in result.stderr
