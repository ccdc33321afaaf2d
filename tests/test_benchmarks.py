"""The benchmarks run and write their figures."""

import json
import subprocess
import sys

import pytest

from programs import PROJECT, environment

BENCHMARKS = sorted(
    path.stem for path in (PROJECT / "benchmarks").glob("*.py") if path.stem not in ("figures", "pictures", "recipes")
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
