"""Assemble a training in the test's process, as `src/train.py` does from the same overrides."""

from pathlib import Path

import lightning as L
from hydra import compose, initialize_config_dir

from programs import PROJECT
from vitrail.data import ImageDataModule
from vitrail.runs.assembly import build_data, build_module, build_trainer
from vitrail.runs.directory import RunDirectory
from vitrail.runs.loggers import MetricsCSV
from vitrail.training import ImageClassifier


def assemble(folder: Path, *overrides: str) -> tuple[L.Trainer, ImageClassifier, ImageDataModule]:
    """Return trainer, module and data of a run in `folder`, without terminal output."""
    quiet = ("callbacks.report=null", "callbacks.progress=null", "trainer.enable_progress_bar=false")
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", [*quiet, "callbacks.model_summary=null", *overrides, f"paths.run={folder}"])
        L.seed_everything(config.seed, workers=True, verbose=False)
        data = build_data(config)
        module = build_module(config, data)
        trainer = build_trainer(config, RunDirectory(folder), data, MetricsCSV(folder / "metrics.csv"))
    return trainer, module, data
