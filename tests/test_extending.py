"""docs/extending.md: its files are taken out of the page, and its commands and scripts run."""

import re
import shutil
import subprocess
import sys

import pytest

from programs import PROJECT, QUICK, environment, run, run_directories, train

PAGE = (PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
FILES = {
    match[1]: text for kind, text in BLOCKS if kind != "bash" and (match := re.match(r"# (\S+\.(?:py|yaml))\n", text))
}
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SCRIPTS = [name for name in FILES if "/" not in name]
SHORTER = (*QUICK, "callbacks.progress=null")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files, a copy of vitrail with the new backbone, and the run and label maps that commands name."""
    folder = tmp_path_factory.mktemp("extending")
    for name in ("src", "conf"):
        shutil.copytree(PROJECT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "results", folder / "results")
    shutil.copy(PROJECT / "pyproject.toml", folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.move(train(*SHORTER, logs=folder), folder / "my_run")
    shutil.copytree(PROJECT / "tests" / "version_0_1" / "maps", folder / "my_maps")
    return folder


def call(folder, program, *arguments):
    """Run a program in the folder; with the vitrail that is there if it is needed, else with a warm one."""
    if program.startswith("src/") and "model.name=vit_pico" not in arguments:
        result = run(program.removeprefix("src/"), *arguments, logs=folder)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
    result = subprocess.run(
        [sys.executable, program, *arguments],
        cwd=folder,
        env=environment(folder, PYTHONPATH=str(folder / "src")),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_page__has_every_kind_of_extension():
    assert len(COMMANDS) >= 9
    assert SCRIPTS == ["own_loop.py", "own_trainer.py", "notebook.py"]
    for group in ("model", "objective", "data", "augment", "mixing"):
        assert any(name.startswith(f"my_conf/{group}/") for name in FILES), group
    assert not [text for kind, text in BLOCKS if kind in ("python", "yaml") and not text.startswith("# ")]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.sample(4)
def test_command__runs(command, folder):
    arguments = re.findall(r'"[^"]+"|\S+', command)
    assert arguments[0] == "python"
    before = set(run_directories(folder))
    shorter = SHORTER if arguments[1] == "src/train.py" else ()
    out = call(folder, *(argument.strip('"') for argument in arguments[1:]), *shorter)
    if "plan=true" in arguments:
        assert "256 of 2 classes" in out
    elif arguments[1] == "src/doctor.py":
        assert "256 train images, 64 val images of 2 classes" in out
    else:
        (directory,) = set(run_directories(folder)) - before
        assert (directory / "results.json").is_file()
        assert ("hello from my_project" in out) == ("hello" in command)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.sample(2)
def test_script__runs(script, folder):
    out = call(folder, script)
    if script == "own_trainer.py":
        assert 0 <= float(out.splitlines()[-1]) <= 100
    if script == "notebook.py":
        assert re.search(r"^[\d.]+ \d$", out, re.M)
