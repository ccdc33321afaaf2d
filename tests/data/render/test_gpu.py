"""The GPU's kernels give the pixels of the PyTorch renderer, whose tests they pass in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).with_name("test_device.py")


def run_interpreted(*options):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
def test_kernels__pass_the_tests_of_whole_batches():
    run_interpreted("-k", "common_canvas or finished_crop")


@pytest.mark.slow
def test_kernels__pass_all_tests_of_the_renderer():
    run_interpreted()
