"""metrics.csv, W&B, TensorBoard and MLflow, and servers that refuse, do not answer, or fail during the training."""

import csv
import json
import os
import signal
import socket
import sqlite3
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import Logger

from programs import QUICK, error_of, metrics, run, run_directories, train
from resuming import child_processes, end_with, start_endless, wait_until
from vitrail.errors import ConfigError
from vitrail.runs import wandb_logger
from vitrail.runs.loggers import MetricsCSV
from vitrail.runs.tolerant import tolerant
from vitrail.runs.wandb_logger import wandb_mode
from wandb_server import serve, variables_of


def test_csv__one_row_per_epoch_also_after_resuming(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"epoch": 0, "val/top1": 10.0}, step=4)
    log.log_metrics({"epoch": 0, "train/loss": 2.5}, step=5)
    log.log_metrics({"epoch": 1, "val/top1": 30.0}, step=9)
    log.log_metrics({"lr": 1.0}, step=9)  # has no epoch, so that it has no row
    log.save()
    again = MetricsCSV(path)
    again.log_metrics({"epoch": 1, "val/top1": 20.0, "new": 1.0}, step=9)  # replaces the interrupted epoch's row
    again.finalize("success")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "0", "step": "5", "new": "", "train/loss": "2.5", "val/top1": "10"},
        {"epoch": "1", "step": "9", "new": "1", "train/loss": "", "val/top1": "20"},
    ]
    assert again.best("val/top1") == 20
    assert again.best("nothing") is None


def test_csv__cannot_be_written_for_a_while(tmp_path, caplog):
    """One warning however often it fails; the rows are kept, and written once the folder exists."""
    log = MetricsCSV(tmp_path / "run" / "metrics.csv")
    log.log_metrics({"epoch": 0, "val/top1": 1.0}, 3)
    for _ in range(2):
        log.save()
    assert caplog.text.count("metrics.csv: cannot be written (No such file or directory)") == 1
    with pytest.raises(ConfigError, match="cannot be written"):
        log.finalize("success")
    (tmp_path / "run").mkdir()
    log.save()
    assert metrics(tmp_path / "run") == [{"epoch": 0, "step": 3, "val/top1": 1}]


class FailingLogger(Logger):
    """Fails at its second call."""

    name, version = "failing", 0

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        self.steps.append(step)
        if len(self.steps) == 2:
            raise OSError("no route to host")


def test_tolerant__warns_once_and_is_not_called_again(caplog):
    logger = tolerant(FailingLogger())
    for step in range(4):
        logger.log_metrics({"loss": 1.0}, step)
    logger.finalize("success")
    assert logger.steps == [0, 1]
    assert caplog.text.count("no route to host") == 1
    assert caplog.text.count("metrics.csv") == 1


def testwandb_mode__decided_before_training(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode()[0] == "offline"
    assert "no API key" in wandb_mode()[1]
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert wandb_mode() == ("offline", "127.0.0.1 cannot be reached")
        listener.listen()
        assert wandb_mode() == ("online", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode() == ("offline", None)
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(ValueError, match="WANDB_MODE=sideways"):
        wandb_mode()


def test_wandb__a_server_that_does_not_answer_leads_to_an_offline_run(tmp_path, monkeypatch, caplog):
    """The timeouts are passed to W&B, which raises when they pass; then the same run starts offline."""
    started = []

    class Recorded(FailingLogger):
        def __init__(self, settings, **options):
            super().__init__()
            self.settings = settings
            started.append((settings.mode, settings.init_timeout, settings.finish_timeout, options["id"]))

        @property
        def experiment(self):
            if self.settings.mode == "online":
                raise TimeoutError("run initialization has timed out after 20.0 sec")
            return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setattr(wandb_logger, "WandbLogger", Recorded)
    monkeypatch.setattr(wandb_logger, "wandb_mode", lambda: ("online", None))
    wandb_logger.wandb(str(tmp_path / "run"), finish_timeout=7)
    identity = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert started == [("online", 20, 7, identity), ("offline", 20, 7, identity)]
    assert caplog.text.count("timed out after 20.0 sec") == 1
    assert "offline" in caplog.text


def wandb_history(directory):
    """Return the history rows of an offline run from its binary files (leveldb log format, one protobuf per record)."""
    import struct

    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted((directory / "wandb").glob("offline-run-*/run-*.wandb")):
        data, position, payload = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            payload += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # full, or last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(payload)
                payload = b""
                if record.WhichOneof("record_type") == "history":
                    rows.append(
                        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    )
    return rows


@pytest.mark.slow
def test_several_loggers__without_key_and_network(tmp_path):
    """W&B (offline, with one warning), TensorBoard and MLflow all get the metrics, and continue in a resumed run."""
    pytest.importorskip("tensorboard")
    result = run("train.py", "logger=[wandb,tensorboard,mlflow]", *QUICK, logs=tmp_path, fresh=True, COLUMNS="400")
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    assert (result.stdout + result.stderr).count("the run is stored offline") == 1
    expected = metrics(directory)[0]

    rows = wandb_history(directory)
    top1 = [float(row["val/top1"]) for row in rows if "val/top1" in row]
    assert top1 == [pytest.approx(expected["val/top1"], rel=1e-4)]
    assert any("first_batch" in key for row in rows for key in row)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == pytest.approx(expected["train/loss"], rel=1e-4)
    assert sorted(events.Tags()["images"]) == ["first_batch", "predictions"]

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("select value from metrics where key = 'val/top5_ema'").fetchall()
        names = database.execute("select name, status from runs").fetchall()
    assert [value for (value,) in rows] == [pytest.approx(expected["val/top5_ema"], rel=1e-4)]
    assert names == [(directory.name, "FINISHED")]
    assert len(list((tmp_path / "mlruns").rglob("first_batch.png"))) == 1

    identity = (directory / "wandb_id.txt").read_text()
    result = run("train.py", f"resume={directory}", "epochs=2", logs=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    assert (directory / "wandb_id.txt").read_text() == identity
    assert {path.stem for path in directory.glob("wandb/*/run-*.wandb")} == {f"run-{identity}"}
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchall() == [(1,)]
        steps = database.execute("select count(*) from metrics where key = 'val/top1'").fetchall()
    assert steps == [(2,)]


@pytest.mark.slow
def test_evaluation__joins_the_trainings_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    offline = {"logs": tmp_path, "fresh": True, "WANDB_MODE": "offline"}
    directory = train(*QUICK, "logger=wandb", **offline)
    loggers = ("logger=[wandb,tensorboard]", "data=digits")
    result = run("eval.py", f"ckpt={directory}", *loggers, "trainer=cpu", **offline)
    assert result.returncode == 0, result.stderr
    (evaluation,) = run_directories(tmp_path, "eval")
    expected = json.loads((evaluation / "results.json").read_text())
    (row,) = [row for row in wandb_history(directory) if "eval/digits/top1" in row]
    assert float(row["eval/digits/top1"]) == pytest.approx(expected["raw"]["top1"])
    assert float(row["eval/digits/top5_ema"]) == pytest.approx(expected["ema"]["top5"])
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert events.Scalars("eval/digits/top1")[0].value == pytest.approx(expected["raw"]["top1"])
    wrong = run("eval.py", f"ckpt={directory}", "logger=wandb", "logger.wandb.workspace=perhaps", **offline)
    assert "logger.wandb" in error_of(wrong)
    assert "top1" not in wrong.stdout, "an option is wrong before the evaluation, not after it"


@pytest.mark.slow
def test_wandb__a_refusing_server_does_not_stop_the_training(tmp_path):
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    with serve(Refusing) as server:
        variables = variables_of(server)
        result = run("train.py", "logger=wandb", *QUICK, logs=tmp_path, fresh=True, COLUMNS="400", **variables)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("stored offline") == 1
    assert len(metrics(run_directories(tmp_path)[0])) == 1


def test_wandb__a_server_that_fails_later_does_not_stop_the_training(tmp_path):
    """It accepts the start of the run and rejects all metrics.

    W&B then tries again for `finish_timeout` seconds at the end. `run` fails after 240 s, the default are 300 s.
    """

    class Failing(BaseHTTPRequestHandler):
        failed = 0

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.endswith("file_stream"):  # where metrics go
                type(self).failed += 1
                self.send_error(503)
                return
            project = {"id": "p", "name": "vitrail", "entity": {"id": "e", "name": "us"}}
            bucket = {"id": "r", "name": "r", "displayName": "r", "historyLineCount": 0, "project": project}
            viewer = {"id": "u", "username": "us", "entity": "us", "flags": "{}", "teams": {"edges": []}}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}, "viewer": viewer, "model": None}
            answer = json.dumps({"data": data, "limits": {}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    options = ("logger=wandb", *QUICK, "epochs=3", "logger.wandb.finish_timeout=5")
    with serve(Failing) as server:
        variables = variables_of(server)
        result = run("train.py", *options, logs=tmp_path, fresh=True, WANDB_MODE="online", **variables)
    assert result.returncode == 0, result.stderr
    assert Failing.failed
    assert "stored offline" not in result.stdout + result.stderr
    (directory,) = run_directories(tmp_path)
    assert len(metrics(directory)) == 3


def is_wandb_core(pid):
    return b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_wandb__a_killed_process_does_not_stop_the_training(image_tree, tmp_path):
    """W&B's own process is killed: one warning, and further epochs follow."""
    options = ("logger=wandb", "callbacks.label_maps=null")
    process, directory = start_endless(tmp_path, image_tree, *options, WANDB_MODE="offline")
    (core,) = filter(is_wandb_core, child_processes(process.pid))
    os.kill(core, signal.SIGKILL)

    def warnings():
        return sum("Wandb" in line for line in (tmp_path / "stdout.txt").read_text().splitlines())

    wait_until(warnings, "warning about W&B", process)
    rows = len(metrics(directory))
    wait_until(lambda: len(metrics(directory)) >= rows + 2, "two more epochs", process)
    assert end_with(process, signal.SIGTERM) == 128 + signal.SIGTERM, (tmp_path / "stderr.txt").read_text()
    assert warnings() == 1
