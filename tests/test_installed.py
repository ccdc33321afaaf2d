"""The built wheel in an environment without the checkout: programs, packaged configs, other Hydra programs."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from programs import PROJECT, QUICK, environment

SHORTER = (*QUICK, "callbacks.progress=null")


def call(folder, *command, **variables):
    """Run a command in `folder`, without anything of the checkout on Python's path."""
    variables = {"HYDRA_FULL_ERROR": "1", **variables}
    clean = {key: value for key, value in environment(folder, **variables).items() if key not in ("PYTHONPATH",)}
    clean.pop("VITRAIL_LOGS")
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=clean, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that sees this one's packages but for vitrail, with vitrail's wheel installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for name in ("src", "conf", "results"):  # a copy: building leaves files behind, which would get into later wheels
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(PROJECT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder / "source")
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", folder / "source"]
    subprocess.run(list(map(str, build)), check=True, timeout=200, capture_output=True)
    (wheel,) = (folder / "wheels").iterdir()
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A plain path in a .pth file does not run the .pth files below it, so the editable checkout stays out.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    install = [*pip, "--python", folder / "env" / "bin" / "python", "install", "-q", "--no-deps", "--ignore-installed"]
    subprocess.run(list(map(str, [*install, wheel])), check=True, timeout=200, capture_output=True)
    return folder / "env" / "bin"


def test_import__is_light_and_registers_the_backbones(installed, tmp_path):
    code = (
        "import sys, vitrail, timm; print(vitrail.__file__, len(timm.list_models('t2t_vit_*')));"
        "sys.exit(any(name in sys.modules for name in ('lightning', 'hydra', 'omegaconf')))"
    )
    result = call(tmp_path, installed / "python", "-c", code)
    assert result.returncode == 0, result.stderr
    file, count = result.stdout.split()
    assert Path(file).is_relative_to(installed.parent)
    assert int(count) >= 12


def test_train__composes_the_packaged_configs_and_the_users(installed, tmp_path):
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    command = (installed / "vitrail", "train", "--config-dir", "my_conf", "experiment=mine", *SHORTER)
    result = call(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "logs" / "train" / "runs").iterdir()  # below the current folder
    assert "seed: 7\n" in (directory / "config.yaml").read_text()
    assert re.search(r"evaluate +vitrail eval ckpt=logs/train/runs/", result.stdout)
    evaluated = call(tmp_path, installed / "vitrail", "eval", f"ckpt={directory}", "trainer=cpu")
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize(
    "arguments",
    [("trainer=ddp_cpu_2",), pytest.param(("-m", "seed=1,2", "trainer=cpu"), marks=pytest.mark.slow)],
)
def test_train__starts_its_other_processes_and_jobs(arguments, installed, tmp_path):
    more = [item for item in SHORTER if item != "trainer=cpu"]
    result = call(tmp_path, installed / "vitrail", "train", *arguments, *more)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("logs/train/*runs/**/results.json"))) == (2 if "-m" in arguments else 1)


def test_vitrail__lists_its_programs(installed, tmp_path):
    result = call(tmp_path, installed / "vitrail")
    assert result.returncode == 0
    for name in (
        "train",
        "eval",
        "annotate",
        "pack",
        "doctor",
        "export",
        "predict",
        "report",
        "benchmark",
        "list_models",
    ):
        assert f"vitrail {name} " in result.stdout
    wrong = call(tmp_path, installed / "vitrail", "trane")
    assert (wrong.returncode, wrong.stderr) == (1, "error: vitrail trane: no such program.\n")


FOREIGN = """
import logging, os, hydra
from hydra.utils import instantiate

class Handler(logging.Handler):
    def emit(self, record): ...

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(config):
    print("built", instantiate(config.thing), os.environ["FOREIGN"], type(logging.getLogger().handlers[0]).__name__)

if __name__ == "__main__":
    main()
"""

CONFIG = """
thing: {_target_: fractions.Fraction, numerator: 1, denominator: 2}
hydra:
  job: {env_set: {FOREIGN: "yes"}}
  job_logging: {version: 1, handlers: {mine: {class: foreign.Handler}}, root: {handlers: [mine]}}
  run: {dir: .}
  output_subdir: null
"""


def test_other_hydra_programs__are_left_alone(installed, tmp_path):
    """With vitrail installed, somebody else's targets, variables, log handlers and resolvers work as before."""
    (tmp_path / "foreign.py").write_text(FOREIGN)
    (tmp_path / "config.yaml").write_text(CONFIG)
    result = call(tmp_path, installed / "python", "foreign.py", "--config-dir", ".")
    assert result.stdout == "built 1/2 yes Handler\n", result.stderr
    code = "import hydra_plugins.vitrail_launchers, hydra_plugins.vitrail_sweeps, sys; from omegaconf import OmegaConf"
    check = "; sys.exit('torch' in sys.modules or OmegaConf.has_resolver('run_dir') or 'vitrail' in sys.modules)"
    assert call(tmp_path, installed / "python", "-c", code + check).returncode == 0
