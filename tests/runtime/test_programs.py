"""Programs before heavy packages are imported: help, error messages, `.env`."""

import os
import subprocess
import sys
from importlib.util import find_spec
from textwrap import dedent

import pytest

from programs import PROJECT, environment, error_of, run, run_python
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


UNUSED = (
    *("captum", "mlflow", "onnx", "onnxruntime", "optuna", "pandas", "pyarrow", "ray", "scipy.stats", "skimage"),
    *("sklearn", "submitit", "tensorboard", "transformers", "wandb.sdk", "wandb_workspaces"),
    "torch._inductor.compile_fx",
)
UNUSED_ROOMS = {
    "vitrail.commands": "annotate benchmark doctor eval export pack plan predict report training_speed tune",
    "vitrail.data": "cached_features folder_datamodules held_out render.device render.gpu render.loader segmentation",
    "vitrail.data.sources": "folders imagenet imagenet_releases index packed parquet tables tars webdataset",
    "vitrail.models": "segmentation",
    "vitrail.objectives": "cosub distillation dynamic_vit evo_vit feature_distillation segmentation token_labeling",
    "vitrail.reporting": "confusions evaluation evaluation_plots page segmentation wandb_panels wandb_workspace",
    "vitrail.runs": "images masks measuring prediction segmentation trained wandb_logger",
    "vitrail.training": "fsdp linear_probe phases predictions segmentation",
}
"""Names of modules and packages, relative to a package."""


def test_training__imports_nothing_that_the_default_config_does_not_use(tmp_path):
    """Look at the modules of a finished training of one step.

    PyTorch, Lightning (torchmetrics) and timm themselves import matplotlib and torchvision's models.
    """
    code = """
        import gc, runpy, sys
        sys.argv[0] = "src/train.py"
        try:
            runpy.run_path("src/train.py", run_name="__main__")
        finally:
            print("imported:", *sys.modules)
            print("collects:", gc.isenabled(), gc.get_freeze_count() > 100_000)
    """
    arguments = ("trainer=cpu", "epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
    result = run_python("-c", dedent(code), *arguments, folder=tmp_path, cwd=PROJECT)
    assert result.returncode == 0, result.stderr
    lines = dict(
        line.split(": ", 1) for line in result.stdout.splitlines() if line.startswith(("imported:", "collects"))
    )
    modules = set(lines["imported"].split())
    assert "vitrail.commands.train" in modules
    assert not modules.intersection(UNUSED)
    rooms = [f"{package}.{name}" for package, names in UNUSED_ROOMS.items() for name in names.split()]
    assert all(find_spec(room) is not None for room in rooms)
    assert not modules.intersection(rooms)
    assert lines["collects"] == "True True"


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


@pytest.mark.parametrize(
    "content",
    [
        "VITRAIL_X=café # a comment\r\n".encode("utf-8-sig"),
        "VITRAIL_X=café\n".encode(),
        "VITRAIL_X=café\r\n".encode("utf-16"),
        "VITRAIL_X='café'\n".encode("latin-1"),
    ],
    ids=["utf-8 with BOM", "utf-8", "utf-16", "latin-1"],
)
def test_dotenv__encodings_of_editors(content, tmp_path, monkeypatch):
    monkeypatch.delenv("VITRAIL_X", raising=False)
    (tmp_path / ".env").write_bytes(content)
    _load_dotenv(tmp_path / ".env")
    assert os.environ["VITRAIL_X"] == "café"
    monkeypatch.delenv("VITRAIL_X")


def test_user_without_a_home__as_in_a_container(tmp_path):
    """The user id is not in the system's list of users, and HOME is not set."""
    if subprocess.run(["unshare", "-U", "--map-user=54321", "true"], check=False).returncode:
        pytest.skip("needs user name spaces")
    code = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from vitrail_runtime.programs import _provide_home; _provide_home()\n"
        "import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home(), pathlib.Path('~/x').expanduser())\n"
    )
    gone = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    there = {key: value for key, value in os.environ.items() if key not in gone} | {"TMPDIR": str(tmp_path)}
    tmp_path.chmod(0o777)
    command = ["unshare", "-U", "--map-user=54321", "--map-group=54321", sys.executable, "-c", code]
    done = subprocess.run(command, env=there, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["54321", f"{tmp_path}/vitrail-54321", f"{tmp_path}/vitrail-54321/x"], done.stderr


def test_folder_that_was_removed__is_said(tmp_path):
    (tmp_path / "gone").mkdir()
    script = f'cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$@"'
    command = ["bash", "-c", script, "bash", sys.executable, str(PROJECT / "src/train.py")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: the current folder no longer exists; change to another one.\n")


def test_override__that_is_not_utf8(tmp_path):
    result = run("train.py", os.fsdecode(b"data.root=/data/bild\xe9r"), logs=tmp_path)
    assert (
        error_of(result)
        == r"error: data.root=/data/bild\xe9r: is not UTF-8, as config files are; rename it, or make a link to it."
    )


def test_failure__ends_workers_that_hang(tmp_path):
    """A worker that ignores SIGTERM, as one does that waits for a dead worker's lock, does not keep the program."""
    code = (
        "import multiprocessing, signal, sys, time; sys.path.insert(0, 'src')\n"
        "from vitrail_runtime.errors import ConfigError\n"
        "from vitrail_runtime.programs import _fail\n"
        "def hang(ready):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    ready.set()\n"
        "    time.sleep(600)\n"
        "ready = multiprocessing.get_context('fork').Event()\n"
        "multiprocessing.get_context('fork').Process(target=hang, args=(ready,), daemon=True).start()\n"
        "ready.wait()\n"
        "_fail(ConfigError('x: wrong.'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stderr) == (1, "error: x: wrong.\n")
