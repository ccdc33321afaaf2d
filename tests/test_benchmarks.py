"""The benchmarks run and write their figures."""

import json
import subprocess
import sys

import pytest

from programs import PROJECT, environment

BENCHMARKS = sorted(
    path.stem
    for path in (PROJECT / "benchmarks").glob("*.py")
    if path.stem not in ("figures", "jpegs", "pictures", "recipes")
)


def benchmark(name, *options, folder):
    return subprocess.run(
        [sys.executable, str(PROJECT / "benchmarks" / f"{name}.py"), *options],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


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
