"""Programs before heavy packages are imported: help, error messages, `.env`."""

import subprocess
import sys

import pytest

from programs import PROJECT, environment, run
from vitrail.errors import ConfigError, ImageError
from vitrail_runtime.programs import _load_dotenv
from vitrail_runtime.sentences import sentence


def test_help__shows_groups_and_overrides(tmp_path):
    result = run("train.py", "--help", logs=tmp_path)
    assert result.returncode == 0
    groups = (
        "model data objective augment optimizer schedule trainer strategy callbacks logger experiment launcher debug"
    )
    for group in [*groups.split(), "paths"]:
        assert f"\n{group}: " in result.stdout
    for override in ("model=deit_small", "data.root=", "trainer=ddp_8gpu", "optimizer.lr=", "resume="):
        assert override in result.stdout


def test_entry_point__imports_no_heavy_packages():
    code = "import sys; import vitrail_runtime; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT / "src", check=False)
    assert result.returncode == 0


def test_shell_completion__completes_groups(tmp_path):
    """Call the function that `eval "$(python src/train.py -sc install=bash)"` installs as bash does."""
    script = f"""
        eval "$({sys.executable} src/train.py -sc install=bash)"
        COMP_LINE="python src/train.py model=deit_s"; COMP_POINT=${{#COMP_LINE}}
        HYDRA_COMP_PATHPREFIX= {sys.executable} src/train.py -sc query=bash
    """
    result = subprocess.run(
        ["bash", "-c", f"export COMP_LINE COMP_POINT; {script}"],
        cwd=PROJECT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "model=deit_small" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("data.root: not set."), "data.root: not set."),
        (RuntimeError("shapes differ\nmore"), "RuntimeError: shapes differ (debug=default shows where)"),
        (PermissionError(13, "Permission denied", "/logs"), "/logs: Permission denied"),
        (
            ImageError(
                "Caught ImageError in worker.\nOriginal Traceback (most recent call last)\n"
                "  x\nvitrail.errors.ImageError: a.jpg: bad"
            ),
            "a.jpg: bad",
        ),
    ],
)
def test_sentence__for_an_exception(error, expected):
    assert sentence(error) == expected


def test_dotenv__does_not_override_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_A", "environment")
    monkeypatch.delenv("VITRAIL_B", raising=False)
    monkeypatch.delenv("VITRAIL_C", raising=False)
    (tmp_path / ".env").write_text('VITRAIL_A=file\nexport VITRAIL_B="two words"\n# VITRAIL_C=x\nVITRAIL_C=\n')
    _load_dotenv(tmp_path / ".env")
    import os

    assert os.environ["VITRAIL_A"] == "environment"
    assert os.environ["VITRAIL_B"] == "two words"
    assert "VITRAIL_C" not in os.environ


def test_env_example__documents_every_variable():
    import re

    read = set()
    for path in [*(PROJECT / "src").rglob("*.py"), *(PROJECT / "conf").rglob("*.yaml")]:
        text = path.read_text()
        read |= set(re.findall(r"oc\.env:([A-Z_]+)", text))
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"((?:VITRAIL|WANDB|MLFLOW)[A-Z_]*)\"", text))
    documented = set(re.findall(r"^([A-Z_]+)=", (PROJECT / ".env.example").read_text(), re.M))
    assert read <= documented
    assert documented <= read
