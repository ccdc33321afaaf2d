"""The run directory: its lock, and the files that describe a run."""

import multiprocessing
import struct
import subprocess

import pytest
import yaml

from programs import PROJECT
from resuming import wait_until
from vitrail.errors import ConfigError
from vitrail.runs import directory as module
from vitrail.runs.directory import RunDirectory, is_claimed, versions


def claim_until(path, claimed, end):
    run = RunDirectory(path)  # the lock is released with this object
    run.claim(patience=0)
    claimed.set()
    end.wait(120)


@pytest.fixture
def other_process(tmp_path):
    """A process that has claimed tmp_path / "run"; gives it and the event that ends it."""
    context = multiprocessing.get_context("forkserver")
    claimed, end = context.Event(), context.Event()
    process = context.Process(target=claim_until, args=(tmp_path / "run", claimed, end))
    process.start()
    wait_until(claimed.is_set, "claim", process)
    yield process, end
    process.kill()
    process.join()


def test_claim__second_process_is_refused(other_process, tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path}/run: another"):
        RunDirectory(tmp_path / "run").claim(patience=0)
    assert other_process[0].is_alive()
    RunDirectory(tmp_path / "other").claim(patience=0)


def test_claim__is_free_after_a_kill(other_process, tmp_path):
    process, _ = other_process
    process.kill()
    process.join()
    RunDirectory(tmp_path / "run").claim(patience=0)


def test_claim__waits_until_the_other_process_has_ended(other_process, tmp_path, monkeypatch, caplog):
    """The other process ends while this one sleeps for the third time; one message says that it waits."""
    process, end = other_process
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            end.set()
            process.join(60)

    monkeypatch.setattr(module.time, "sleep", sleep)
    RunDirectory(tmp_path / "run").claim(patience=600)
    assert len(sleeps) == 3
    assert caplog.text.count(f"{tmp_path}/run: another") == 1
    assert "600 s" in caplog.text


def test_claim__gives_up_after_its_patience(other_process, tmp_path, monkeypatch):
    """The clock moves by what this process sleeps."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(ConfigError, match="another"):
        RunDirectory(tmp_path / "run").claim(patience=30)
    assert 30 <= now[0] < 32


def test_record__config_overrides_and_versions(tmp_path):
    run = RunDirectory(tmp_path / "new" / "run")
    run.record({"epochs": 3, "model": {"name": "vit_nano"}}, ["epochs=3", "model.name=vit_nano"])
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "overrides.txt", "versions.yaml"}
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"epochs": 3, "model": {"name": "vit_nano"}}
    assert (run.path / "overrides.txt").read_text() == "epochs=3\nmodel.name=vit_nano\n"
    assert yaml.safe_load((run.path / "versions.yaml").read_text()) == versions()


def test_record__a_resumed_run_keeps_its_first_overrides(tmp_path):
    run = RunDirectory(tmp_path)
    file = tmp_path / "overrides.txt"
    run.record({"resume": None}, ["epochs=3", "seed=1"])
    run.record({"resume": "x"}, ["epochs=3", "seed=1"])  # restarted by torchrun: the same command
    assert file.read_text() == "epochs=3\nseed=1\n"
    run.record({"resume": "x"}, ["seed=1"])  # another command, although the file ends like this
    assert file.read_text().count("seed=1") == 2
    file.write_text("epochs=3\nseed=1\n")
    for _ in range(2):
        run.record({"resume": "x"}, ["resume=x", "epochs=9"])
    run.record({"resume": "x"}, ["resume=x"])
    lines = file.read_text().splitlines()
    assert lines[2].startswith("# resumed 2")
    del lines[2], lines[4]
    assert lines == ["epochs=3", "seed=1", "resume=x", "epochs=9", "resume=x"]
    run.record({"resume": None}, ["seed=2"])
    assert file.read_text() == "seed=2\n"


@pytest.mark.parametrize(("system", "layout", "place"), [("linux", "hhqqi4x", 0), ("darwin", "qqihh", 3)])
def test_is_claimed__reads_the_lock_of_each_system(tmp_path, monkeypatch, system, layout, place):
    """The layouts are those of struct flock in the systems' headers; the kernel's answer is made up."""
    (tmp_path / ".lock").touch()
    monkeypatch.setattr(module.sys, "platform", system)
    for held in (module.fcntl.F_UNLCK, module.fcntl.F_WRLCK):

        def answer(_, command, asked, held=held):
            fields = list(struct.unpack(layout, asked))
            assert (command, fields.pop(place), fields) == (module.fcntl.F_GETLK, module.fcntl.F_WRLCK, [0] * 4)
            fields.insert(place, held)
            return struct.pack(layout, *fields)

        monkeypatch.setattr(module.fcntl, "fcntl", answer)
        assert is_claimed(tmp_path) == (held == module.fcntl.F_WRLCK)


def test_is_claimed__unknown_on_other_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "freebsd15")
    assert is_claimed(tmp_path) is None


def test_record__unwritable_directory_is_named(tmp_path):
    (tmp_path / "run").write_text("a file instead of a folder")
    with pytest.raises(ConfigError, match=rf"paths.logs: .*{tmp_path}/run \(File exists\)"):
        RunDirectory(tmp_path / "run").record({}, [])


def test_write__a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    """The old content stays until the new file is complete; a failed write leaves it."""
    run = RunDirectory(tmp_path)
    run.write("results.json", "old")
    written = module.Path.write_text

    def half(path, text, **options):
        written(path, text[:1], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        run.write("results.json", "new")
    monkeypatch.undo()
    assert (tmp_path / "results.json").read_text() == "old"


def test_versions__commit_and_packages():
    from importlib import metadata

    import timm

    found = versions()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["timm"] == timm.__version__
    head = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_versions__without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] is None
