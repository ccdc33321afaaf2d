"""Run directories as train.py writes them, without a training."""

import csv
import json
from pathlib import Path

import yaml

START = "2026-01-02 03:00:00,000 INFO vitrail.commands.train: run directory {path}\n"


def make_run(
    path, *, overrides=(), epochs=3, planned=None, columns=None, without="none", finished=True, log=None, **config
):
    """Write a run directory, and return it.

    Args:
        path: run directory.
        overrides: its command line.
        epochs: rows of metrics.csv; no file for None.
        planned: epochs in the config; None for `epochs`.
        columns: further columns, a function of the epoch each.
        without: prefix, or prefixes, of the columns to leave out.
        finished: whether it has results.json.
        log: text of train.log after its first line.
        config: further entries of config.yaml.
    """
    path.mkdir(parents=True)
    tree = {"task": "train", "epochs": planned or epochs, "optimizer": {"lr": 0.001, "weight_decay": 0.05}}
    paths = {"paths": {"run": str(path), "logs": str(path.parents[2])}, "data": {"skipped_file": f"{path}/skipped.txt"}}
    (path / "config.yaml").write_text(yaml.safe_dump({**tree, **paths, **config}))
    (path / "overrides.txt").write_text("".join(f"{item}\n" for item in overrides))
    (path / "versions.yaml").write_text("commit: abc\npackages: {torch: 2.8.0}\n")
    (path / "train.log").write_text(START.format(path=path) + (log if log is not None else epoch_lines(epochs or 0)))
    metrics = {
        "val/top1": lambda epoch: 50 + 10 * epoch,
        "val/top1_ema": lambda epoch: 49 + 11 * epoch,
        "val/loss": lambda epoch: 2 / (epoch + 1),
        "train/loss": lambda epoch: 3 / (epoch + 1),
        "speed/images_per_second": lambda _: 100,
        **(columns or {}),
    }
    metrics = {name: value for name, value in metrics.items() if not name.startswith(without)}
    if epochs is not None:
        with (path / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["epoch", "step", *metrics])
            rows.writerows(
                [epoch, 10 * epoch, *(value(epoch) for value in metrics.values())] for epoch in range(epochs)
            )
    if finished:
        (path / "results.json").write_text(json.dumps({"epochs": epochs, "seconds": 60}))
    return path


def epoch_lines(count, first=1, minute=1):
    """Return the log lines of epochs, one a minute."""
    return "".join(
        f"2026-01-02 03:{minute + index:02}:00,000 INFO vitrail.training.callbacks: epoch {first + index}/9, loss 1\n"
        for index in range(count)
    )


def make_sweep(path: Path, values, **options):
    """Write a sweep with one run for each (lr, weight decay, top-1 after the last epoch), and return its directory."""
    jobs = []
    for number, (lr, decay, top1) in enumerate(values):
        overrides = [f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}"]
        columns = {"val/top1": lambda epoch, top1=top1: top1 - 5 + epoch * 2.5}
        optimizer = {"lr": lr, "weight_decay": decay}
        make_run(path / str(number), overrides=overrides, columns=columns, optimizer=optimizer, **options)
        jobs.append({"number": number, "overrides": overrides, "status": 0, "seconds": 1.0, "results": {}})
    (path / "jobs.json").write_text(json.dumps(jobs))
    return path
