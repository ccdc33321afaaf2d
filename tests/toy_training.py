"""A program with train.py's config that only pretends to train: for fast tests of launchers and sweeps."""

import csv
import json
import os
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "src"))

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402

from vitrail_runtime import resolvers  # noqa: E402
from vitrail_runtime.secrets import redacted  # noqa: E402


def main(config):
    """Write results that depend on learning rate and epochs (best at 1e-3); `seed=13` fails, `seed=14` is killed."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    overrides = redacted([*HydraConfig.get().overrides.task])
    (directory / "overrides.txt").write_text("".join(f"{line}\n" for line in overrides))
    (directory / "starts.txt").open("a").write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {config.resume}\n")
    if config.seed == 13:
        raise ValueError("seed=13: brings bad luck.")
    if config.seed == 14:
        os.kill(os.getpid(), 9)
    (directory / "checkpoints").mkdir(exist_ok=True)
    (directory / "checkpoints" / "last.ckpt").touch()
    values = []
    for epoch in range(config.epochs):
        values.append(100 - 1e4 * abs(config.optimizer.lr - 1e-3) - 10 / (epoch + 1))
        with (directory / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["epoch", "val/top1"])
            rows.writerows(enumerate(values))
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
        if (directory / "stop").exists():
            sys.exit(143)
    (directory / "results.json").write_text(json.dumps({"val/top1": max(values), "epochs": config.epochs}))


if __name__ == "__main__":
    resolvers.register()
    hydra.main(version_base="1.3", config_path=str(PROJECT / "conf"), config_name="train")(main)()
