"""The benchmarks run and write their figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from programs import PROJECT, run_python
from vitrail.data.segmentation.values import read_mask

BENCHMARKS = sorted(
    path.stem
    for path in (PROJECT / "benchmarks").glob("*.py")
    if path.stem not in ("comparisons", "digits_on_photographs", "figures", "jpegs", "pictures", "recipes")
)


def benchmark(name, *options, folder):
    return run_python(str(PROJECT / "benchmarks" / f"{name}.py"), *options, folder=folder)


@pytest.mark.thorough
def test_demo__chooses_settings_and_states_what_differs(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import comparisons
    import demo

    rows = [
        {"kind": "neither", "lr": lr, "warmup": warmup, "seed": seed, "top1": top1 + seed}
        for seed in (11, 12)
        for lr, warmup, top1 in ((1e-3, 1, 50.0), (2e-3, 1, 70.0), (2e-3, 3, 69.0))
    ]
    assert demo.choose(rows) == {"neither": demo.Settings(2e-3, 1)}
    assert comparisons.interval([1.0, 2.0, 3.0]) == pytest.approx(
        4.302653 / 3**0.5
    )  # Student's t with 2 degrees of freedom
    assert [comparisons.epochs_until(values, 80) for values in ([10, 80, 70], [81, 90, 95], [1, 2, 3])] == [2, 1, 4]
    curves = {"labels": {1: [50.0, 90.0], 2: [60.0, 92.0]}, "neither": {1: [10.0, 80.0], 2: [20.0, 86.0]}}
    figures = comparisons.report(curves, "")
    assert (figures["labels_mean"], figures["labels_difference"]) == (91.0, 8.0)
    assert figures["labels_difference_half_interval"] == pytest.approx(2 * 12.7062, rel=1e-4)


@pytest.mark.thorough
def test_demo__the_search_doubles_the_learning_rate_until_it_is_worse(monkeypatch):
    """The best rates are 2e-3 and 1e-3 without regard to warm-up; three epochs of it add one point."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import demo

    def try_out(candidates):
        best = {"labels": 2e-3, "neither": 1e-3}
        return [
            {"kind": kind, "lr": lr, "warmup": warmup, "seed": seed, "top1": 90 - abs(lr / best[kind] - 1) + warmup}
            for seed in demo.SEARCH_SEEDS
            for kind, (lr, warmup) in candidates
        ]

    without_data = object.__new__(demo.Demo)
    without_data.try_out = try_out
    rows = without_data.search(("labels", "neither"))
    rates = {
        (kind, warmup): [row["lr"] for row in rows if (row["kind"], row["warmup"], row["seed"]) == (kind, warmup, 11)]
        for kind in ("labels", "neither")
        for warmup in (1, 3)
    }
    assert rates == {
        ("labels", 1): [5e-4, 1e-3, 2e-3, 4e-3], ("labels", 3): [1e-3, 2e-3, 4e-3],
        ("neither", 1): [5e-4, 1e-3, 2e-3], ("neither", 3): [1e-3, 2e-3],
    }  # fmt: skip
    assert demo.choose(rows) == {"labels": demo.Settings(2e-3, 3), "neither": demo.Settings(1e-3, 3)}


@pytest.mark.thorough
@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.sample(5)
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
def test_pictures__every_one_of_the_pages_is_made(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import pictures

    pages = (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"))
    shown = {Path(name).stem for page in pages for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())}
    assert shown == set(pictures.makers_of(PROJECT))


@pytest.mark.thorough
def test_demo_segmentation__masks_cover_the_digits(tmp_path, monkeypatch):
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
