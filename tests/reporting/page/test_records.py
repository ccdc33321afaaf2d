"""Runs as the report reads them: their status, their history, and files that are missing or damaged."""

import fcntl
import json
import shutil
import subprocess
import sys

import pytest

from report_runs import epoch_lines, make_run, make_sweep
from vitrail.errors import ConfigError
from vitrail.reporting.page import common_folder, find_evaluations, find_runs, read_run, signature
from vitrail.runs.directory import is_claimed


def read(path, claimed=False):
    return read_run(path, path.parent, lambda _: claimed)


def test_find_runs__at_any_depth_without_evaluations(tmp_path):
    single = make_run(tmp_path / "train" / "runs" / "a")
    sweep = make_sweep(tmp_path / "train" / "multiruns" / "s", [(1, 1, 1)] * 11)
    make_run(tmp_path / "eval" / "runs" / "b", task="eval")
    (tmp_path / "eval" / "runs" / "b" / "eval.log").touch()
    (single / "checkpoints").mkdir()
    jobs = [sweep / str(number) for number in range(11)]
    assert find_runs([str(tmp_path)]) == [*jobs, single]
    assert find_runs([str(single)]) == [single]
    assert find_runs([str(tmp_path / "train" / "runs" / "*"), str(sweep)]) == [*jobs, single]
    assert common_folder([str(tmp_path / "train" / "runs" / "*"), str(sweep)]) == tmp_path / "train"
    assert common_folder([str(sweep)]) == sweep
    shutil.rmtree(sweep / "3")
    (sweep / "3").mkdir()  # a job that failed before it wrote anything
    assert find_runs([str(sweep)]) == jobs


def test_find_runs__none(tmp_path):
    with pytest.raises(ConfigError, match=r"runs=.*: contains no run of train.py"):
        find_runs([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"runs=/nowhere: no such folder"):
        find_runs(["/nowhere"])


def test_read_run__finished(tmp_path):
    run = read(make_run(tmp_path / "a" / "b" / "run", overrides=["optimizer.lr=0.001"]))
    assert (run.status, run.problems, run.epochs) == ("finished", [], 3)
    assert (run.best("val/top1"), run.best("val/top1_ema"), run.best("val/loss")) == (70, 71, pytest.approx(2 / 3))
    assert run.seconds == 180  # by the log: three epochs of a minute
    assert run.images_per_second == 100
    assert run.config["data"]["skipped_file"] == "<run>/skipped.txt"
    assert run.versions["packages"] == {"torch": "2.8.0"}


def test_read_run__status(tmp_path):
    def status(name, **options):
        run = read(make_run(tmp_path / "a" / "b" / name, **options))
        return run.status, run.sentence

    trace = (
        "2026-01-02 03:02:00,000 DEBUG vitrail: failed\nTraceback (most recent call last):\n  File x\n"
        "vitrail_runtime.errors.ConfigError: data.root=/x: no such folder.\n"
    )
    assert status("killed", finished=False, planned=9) == ("stopped", "")
    unfinished = make_run(tmp_path / "a" / "b" / "elsewhere", finished=False, planned=9)
    assert read_run(unfinished, tmp_path, lambda _: None).status == "unknown"
    assert status("more", planned=9) == ("stopped", "")  # resumed for more epochs after it had finished
    assert status("failed", finished=False, log=trace) == ("failed", "data.root=/x: no such folder.")
    foreign = trace.replace("vitrail_runtime.errors.ConfigError: data.root=/x: no", "torch.OutOfMemoryError: no")
    assert status("foreign", finished=False, log=foreign) == ("failed", "OutOfMemoryError: no such folder.")
    again = "2026-01-02 03:04:00,000 INFO vitrail.commands.train: run directory x\n" + epoch_lines(3, minute=5)
    assert status("repaired", log=trace + again) == ("finished", "")
    assert read(tmp_path / "a" / "b" / "killed", claimed=True).status == "running"


def test_read_run__job_of_a_sweep(tmp_path):
    sweep = make_sweep(tmp_path / "a" / "s", [(1, 1, 50), (2, 1, 60), (3, 1, 70)], finished=False, planned=9)
    jobs = json.loads((sweep / "jobs.json").read_text())
    for job, code in zip(jobs, ("pruned", 1, 137), strict=True):
        job["status"] = code
    (sweep / "jobs.json").write_text(json.dumps(jobs))
    (sweep / "1" / "console.log").write_text("hello\nerror: optimizer.lr=2: too large.\n")
    runs = [read(sweep / str(number)) for number in range(3)]
    assert [(run.status, run.sentence) for run in runs] == [
        ("pruned", ""),
        ("failed", "optimizer.lr=2: too large."),
        ("failed", "exit status 137"),
    ]
    assert {run.sweep for run in runs} == {"s"}


def test_read_run__history_of_a_resumed_run(tmp_path):
    log = (
        epoch_lines(2)
        + "2026-01-02 03:03:00,000 INFO vitrail.commands.train: stopped by SIGTERM in epoch 3, saved; resume=x\n"
        "2026-01-02 03:10:00,000 INFO vitrail.commands.train: run directory x\n"
        "2026-01-02 03:11:00,000 WARNING vitrail.training.nonfinite_guard: epoch 3: a loss of nan. Step skipped.\n"
        + epoch_lines(1, first=3, minute=12)
    )
    run = read(make_run(tmp_path / "a" / "b" / "run", log=log))
    assert [(event.kind, event.text) for event in run.history.events] == [
        ("start", "started"),
        ("preempted", "stopped by SIGTERM in epoch 3, saved"),
        ("resume", "resumed"),
        ("warning", "epoch 3: a loss of nan. Step skipped."),
    ]
    spans = [(part.first, part.last, part.ending, part.end - part.start) for part in run.history.stretches]
    assert spans == [(1, 2, "preempted", 180), (3, 3, "", 120)]
    assert run.seconds == 300


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metrics.csv", b"epoch,val/top1\n0,50\n1,6", None),  # a number that was cut is still one
        ("metrics.csv", b"epoch,val/top1\n0,50\n1\n2,x\n", "metrics.csv: 2 of 3 rows are damaged and left out"),
        ("metrics.csv", b"val/top1\n50\n", "metrics.csv: cannot be read (no column epoch)"),
        ("metrics.csv", b"", "metrics.csv: cannot be read (no column epoch)"),
        ("metrics.csv", b"\x00\xff\x00", "metrics.csv: cannot be read (no column epoch)"),
        ("metrics.csv", b"epoch,val/top1\n", "metrics.csv: has no finished epoch"),
        ("metrics.csv", None, "metrics.csv: missing"),
        ("config.yaml", b"a: [", "config.yaml: cannot be read (while parsing a flow node)"),
        ("config.yaml", b"text", "config.yaml: cannot be read (not a mapping)"),
        ("config.yaml", b"\xff\xfe", "config.yaml: cannot be read ('utf-8' codec"),
        ("results.json", b"{", "results.json: cannot be read (Expecting"),
        ("results.json", b'{"epochs": null}', "results.json: cannot be read (epochs is not a number)"),
        ("results.json", b'{"epochs": 3, "seconds": "long"}', "results.json: cannot be read (seconds is not a number)"),
        ("config.yaml", b"a: &a [*a]", "config.yaml: cannot be read (maximum recursion depth"),
        ("config.yaml", b"epochs: '12'", None),
        ("overrides.txt", None, "overrides.txt: missing"),
    ],
)
def test_read_run__damaged_file(tmp_path, name, content, problem):
    path = make_run(tmp_path / "a" / "b" / "run")
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    problems = read(path).problems
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)


@pytest.mark.parametrize("overrides", [5, [5], None])
def test_read_run__damaged_overrides_of_a_job(tmp_path, overrides):
    sweep = make_sweep(tmp_path / "a" / "s", [(1, 1, 50)])
    jobs = json.loads((sweep / "jobs.json").read_text())
    (sweep / "jobs.json").write_text(json.dumps([{**job, "overrides": overrides} for job in jobs]))
    run = read(sweep / "0")
    assert run.status == "finished"
    assert all(isinstance(item, str) for item in run.overrides)


def test_read_run__numbers_that_are_not_finite(tmp_path):
    path = make_run(tmp_path / "a" / "b" / "run", columns={"val/top1": lambda epoch: ["nan", 40, ""][epoch]})
    run = read(path)
    assert run.metrics["val/top1"] == [None, 40, None]
    assert run.best("val/top1") == 40


def test_signature__changes_with_the_files(tmp_path):
    path = make_run(tmp_path / "a" / "b" / "run")
    before = signature(path)
    assert signature(path) == before
    (path / "train.log").open("a").write("x")
    assert signature(path) != before


def test_is_claimed__while_another_process_has_the_lock(tmp_path):
    assert not is_claimed(tmp_path)
    (tmp_path / ".lock").touch()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True);"
        " sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    assert is_claimed(tmp_path)
    holder.communicate(b"\n")
    assert not is_claimed(tmp_path)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_find_evaluations__latest_of_each_run(tmp_path):
    run = make_run(tmp_path / "train" / "runs" / "a")
    for number, ckpt in enumerate(
        (run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt", "/other.ckpt")
    ):
        folder = make_run(tmp_path / "eval" / "runs" / str(number), task="eval", ckpt=str(ckpt))
        assert (folder / "results.json").is_file()
    (tmp_path / "eval" / "runs" / "3").mkdir()
    (tmp_path / "eval" / "runs" / "3" / "config.yaml").write_text("a: [")
    assert find_evaluations(tmp_path / "eval", [run]) == {run: tmp_path / "eval" / "runs" / "1"}
