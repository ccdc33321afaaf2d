"""`python src/report.py`: pages of real runs, of damaged ones, and of runs that change."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from programs import QUICK, error_of, run, start, train
from report_runs import make_run, make_sweep


def data_of(file):
    (found,) = re.findall(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found)


def test_report__of_a_trained_and_evaluated_run(tmp_path):
    directory = train(*QUICK, "model=deit_nano", "callbacks.ema.decay=0.5", logs=tmp_path)
    result = run("eval.py", f"ckpt={directory.relative_to(tmp_path)}", "trainer=cpu", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("report.py", f"runs={directory}", "out=pages/one.html", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "pages/one.html: 1 run," in result.stdout
    assert "WARNING" not in result.stdout
    (entry,) = data_of(tmp_path / "pages" / "one.html")["runs"]
    results = json.loads((directory / "results.json").read_text())
    assert entry["status"] == "finished"
    assert (entry["best"], entry["best_ema"]) == pytest.approx((results["val/top1"], results["val/top1_ema"]), rel=1e-4)
    assert "trainer=cpu epochs=1" in entry["command"]
    assert entry["pictures"]["first_batch"]["data"]
    assert [evaluation["weights"] for evaluation in entry["evaluations"]] == ["raw", "ema"]
    for evaluation in entry["evaluations"]:
        top1 = evaluation["summary"]["top1"]
        images = evaluation["summary"]["images"]
        assert sum(share * count for _, share, count in evaluation["calibration"]) / images == pytest.approx(
            top1 / 100, abs=1e-3
        )
        assert sum(count for *_, count in evaluation["pairs"]) == round(images * (1 - top1 / 100))
        assert len(evaluation["classes"]) == 10
        assert evaluation["pictures"]["confused pairs"]["data"]


def test_report__names_that_are_hard_to_print(tmp_path):
    """Names with rich's markup, HTML and bytes that are not UTF-8 are shown as they are."""
    names = ("[red] a", "<b>b", os.fsdecode(b"caf\xe9"))
    for number, name in enumerate(names):
        made = make_run(tmp_path / "a" / "train" / str(number), epochs=None, note=["[red]", "<b>", "c"][number])
        made.rename(made.with_name(name))
    result = run("report.py", f"runs={tmp_path / 'a'}", logs=tmp_path, COLUMNS="300")
    assert result.returncode == 0, result.stderr
    shown = ["train/[red] a", "train/<b>b", r"train/caf\xe9"]
    for name in shown:
        assert f"{name}: metrics.csv: missing" in result.stdout
    assert "<b>b" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(item["name"] for item in data_of(tmp_path / "report.html")["runs"]) == sorted(shown)


def test_report__one_broken_run_does_not_spoil_the_page(tmp_path):
    sweep = make_sweep(tmp_path / "train" / "sweep", [(1, 1, 60), (2, 1, 70), (3, 1, 50)])
    (sweep / "1" / "metrics.csv").write_bytes(b"\x00\xff")
    (sweep / "1" / "config.yaml").write_bytes(b"a: [")
    shutil.rmtree(sweep / "2")
    (sweep / "2").mkdir()
    result = run("report.py", f"runs={sweep}", logs=tmp_path, COLUMNS="300")
    assert result.returncode == 0, result.stderr
    assert "1: metrics.csv: cannot be read (no column epoch)" in result.stdout
    assert "2: config.yaml, overrides.txt, versions.yaml, metrics.csv: missing" in result.stdout
    runs = data_of(tmp_path / "report.html")["runs"]
    assert [item["best"] for item in runs] == [60, None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs=/nowhere",), "runs=/nowhere: no such folder"),
        (("runs=empty",), "runs=empty: contains no run of train.py"),
        (("runs=train", "metric=val/top9"), "metric=val/top9: no run has this column; choose from speed/images_per_"),
        (("runs=train", "evaluations=/nowhere"), "evaluations=/nowhere: no such folder."),
        (("runs=train", "out=/proc/x/report.html"), "out=/proc/x/report.html: cannot be written"),
        (("runs=train", "interval=0"), "interval=0: "),
        ((), "runs"),
    ],
)
def test_report__bad_input(tmp_path, arguments, message):
    make_run(tmp_path / "train" / "runs" / "a")
    (tmp_path / "empty").mkdir()
    assert message in error_of(run("report.py", *arguments, logs=tmp_path))


def test_report__live_page_follows_the_runs_until_ctrl_c(tmp_path):
    make_run(tmp_path / "train" / "runs" / "a")
    page = tmp_path / "report.html"
    process = start("report.py", "runs=train", "live=true", "interval=0.2", logs=tmp_path)

    def wait(condition):
        deadline = time.monotonic() + 60
        while not (page.is_file() and condition(data_of(page))):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait(lambda data: data["reload"] == 0.2 and len(data["runs"]) == 1)
    unchanged = page.stat().st_mtime_ns
    time.sleep(1)
    assert page.stat().st_mtime_ns == unchanged
    make_run(tmp_path / "train" / "runs" / "b")
    wait(lambda data: len(data["runs"]) == 2)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "stderr.txt").read_text()
    assert data_of(page)["reload"] is None
