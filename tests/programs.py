"""Run the entry points as a user does: in real processes, with their own run directories."""

import csv
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent

# The smallest real training: one epoch of two batches of the digits, without the model summary.
QUICK = ("trainer=cpu", "epochs=1", "trainer.limit_train_batches=2", "callbacks.model_summary=null")


def environment(logs: Path, **extra: str) -> dict[str, str]:
    """Return a user's environment without keys, with one thread per process, and with `logs` as logs folder."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "VITRAIL"))}
    return {
        **inherited,
        "VITRAIL_LOGS": str(logs),
        "OMP_NUM_THREADS": "1",
        "HOME": str(logs),
        "COLUMNS": "200",
        **extra,
    }


def run(
    program: str, *args: str, logs: Path, timeout: float = 240, fresh: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run `src/<program>` to its end in a new process.

    The process is forked from an interpreter that has already imported PyTorch and Lightning, because importing them
    would take most of the time. `fresh` starts a new interpreter, for tests of what happens when an interpreter exits,
    such as W&B closing its files.
    """
    command = [str(PROJECT / "src" / program), *args]
    if fresh:
        return subprocess.run(
            [sys.executable, *command],
            env=environment(logs, **extra),
            cwd=logs,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(program, *args, logs=logs, files=files, **extra)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, *(file.read_text() for file in files))
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def start(
    program: str, *args: str, logs: Path, files: list[Path] | None = None, **extra: str
) -> multiprocessing.process.BaseProcess:
    """Start `src/<program>` in the background; its output goes to stdout.txt and stderr.txt in `logs`."""
    files = files or [logs / "stdout.txt", logs / "stderr.txt"]
    command = [str(PROJECT / "src" / program), *args]
    process = _WARM.Process(target=_execute, args=(command, environment(logs, **extra), str(logs), files))
    process.start()
    return process


def start_ranks(
    program: str, *args: str, logs: Path, ranks: int = 2, **extra: str
) -> list[multiprocessing.process.BaseProcess]:
    """Start `ranks` processes of one training as torchrun does, but with the imports already done.

    Rank r writes to stdout<r>.txt and stderr<r>.txt in `logs`.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps such a store too
    _STORES.append(store)
    shared = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **extra,
    }
    variables = {name: str(value) for name, value in shared.items()}
    return [
        start(program, *args, logs=logs, files=_outputs(logs, rank), RANK=str(rank), LOCAL_RANK=str(rank), **variables)
        for rank in range(ranks)
    ]


def run_ranks(
    program: str, *args: str, logs: Path, ranks: int = 2, timeout: float = 240, **extra: str
) -> list[subprocess.CompletedProcess[str]]:
    """Start `ranks` processes of one training, and wait for all of them."""
    processes = start_ranks(program, *args, logs=logs, ranks=ranks, **extra)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    return [
        subprocess.CompletedProcess(
            [program, *args], process.exitcode, *(file.read_text() for file in _outputs(logs, rank))
        )
        for rank, process in enumerate(processes)
    ]


def run_python(*arguments: str, folder: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments in a process of its own, with logs in `folder`, which is the working directory too."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(folder),
        cwd=cwd or folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _outputs(logs: Path, rank: int) -> list[Path]:
    return [logs / f"stdout{rank}.txt", logs / f"stderr{rank}.txt"]


_STORES: list[Any] = []
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(
    [f"vitrail.commands.{name}" for name in ("train", "eval", "annotate", "pack", "doctor", "predict", "report")]
)


def _execute(command: list[str], variables: dict[str, str], folder: str, files: list[Path]) -> None:
    """Run a program in this process, with its arguments, environment, working directory and output files."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
    multiprocessing.set_start_method("fork", force=True)  # Python's default, for data loader workers
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = command
    sys.path[:1] = [str(Path(command[0]).parent), *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = int(variables.get("RANK", "0"))  # Lightning reads the rank only when it is imported
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    runpy.run_path(command[0], run_name="__main__")


def train(*args: str, logs: Path, timeout: float = 240, fresh: bool = False, **extra: str) -> Path:
    """Train, expect success, and return the run directory."""
    before = set(run_directories(logs))
    result = run("train.py", *args, logs=logs, timeout=timeout, fresh=fresh, **extra)
    assert result.returncode == 0, result.stdout + result.stderr
    (directory,) = set(run_directories(logs)) - before
    return directory


def train_and_export(logs: Path) -> tuple[Path, Path]:
    """Train a DeiT-nano for two steps; return the run, whose EMA weights differ from the raw ones, and its export."""
    directory = train(*QUICK, "model=deit_nano", "callbacks.ema.decay=0.5", "augment.crop_pct=0.9", logs=logs)
    result = run("export.py", f"ckpt={directory}", "to=hub", f"out={logs / 'hub'}", logs=logs)
    assert result.returncode == 0, result.stderr
    return directory, logs / "hub"


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one-line error of a run that must fail without a traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def run_directories(logs: Path, task: str = "train") -> list[Path]:
    return sorted((logs / task / "runs").glob("*"))


def metrics(directory: Path) -> list[dict[str, float]]:
    with (directory / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
