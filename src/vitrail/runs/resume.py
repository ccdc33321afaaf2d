"""Resume a training: find its config, its checkpoint and the next batch."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from vitrail.checkpoints.classes import require_same
from vitrail.checkpoints.fitting import check_weights
from vitrail.checkpoints.reading import backbone_weights, origin_of, read_checkpoint
from vitrail.errors import ConfigError
from vitrail.runs.config import plain
from vitrail.runs.directory import RunDirectory
from vitrail_runtime.compat import (
    completed_batches,
    epochs_in_checkpoint,
    next_batch,
    reopen_train_loader,
    skip_batches,
)
from vitrail_runtime.renames import upgraded
from vitrail_runtime.secrets import redacted

log = logging.getLogger(__name__)


def continue_restarted(config: DictConfig, run: RunDirectory) -> DictConfig:
    """Return `config` with `resume` set to the run directory, for a training that torchrun or SLURM restarted.

    Raises:
        ConfigError: the run directory contains another run.
    """
    before, now = (redacted(upgraded(plain(tree))) for tree in (OmegaConf.load(run.path / "config.yaml"), config))
    for tree in (before, now):
        tree.pop("resume")
        for key in ("devices", "num_nodes"):
            tree["trainer"].pop(key)
    if before != now:
        raise ConfigError(
            f"hydra.run.dir={run.path}: contains another run; choose another hydra.run.dir (or --rdzv-id)."
        )
    log.info("restarted in %s: resuming", run.path)
    with open_dict(config):
        config.resume = str(run.path)
    return config


def checkpoint_to_resume(
    config: DictConfig, run: RunDirectory, model: nn.Module, classes: Sequence[str]
) -> Path | None:
    """Return the last checkpoint of the run to resume; None to start from the beginning.

    Args:
        config: config of the training.
        run: its directory.
        model: its backbone.
        classes: class names of the data.

    Raises:
        ConfigError: the run is finished, or its checkpoint does not fit `model` or the data's classes.
    """
    if not config.resume:
        return None
    if not run.last.is_file():
        log.warning("resume=%s: no checkpoint yet; starting from the beginning.", config.resume)
        return None
    checkpoint = read_checkpoint(run.last, values=False)
    weights = backbone_weights(checkpoint, ema=False, names=model.state_dict().keys())
    check_weights(model, weights, source=f"resume={run.last}")
    advice = "undo the change of the class folders, or start a new training with init_from"
    require_same(origin_of(checkpoint, run.last).classes, classes, f"resume={config.resume}", advice)
    epochs = epochs_in_checkpoint(checkpoint)
    if epochs >= config.trainer.max_epochs:
        raise ConfigError(
            f"resume={config.resume}: all {epochs} epochs are done; to continue, set epochs to more than {epochs}."
        )
    return run.last


class ResumePosition(L.Callback):
    """Callback that makes a resumed training start with the next batch of its epoch.

    Lightning opens the data loader before it restores the position in the epoch, so the loader has to be opened again.
    If the number of processes or the batch size has changed, the training continues after the same number of images.
    """

    def __init__(self) -> None:
        self.images_per_batch: int | None = None
        self.training_images: int | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the number of images per batch over all processes."""
        checkpoint["images_per_batch"] = _images_per_batch(trainer)
        checkpoint["training_images"] = _training_images(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the number of images per batch."""
        self.images_per_batch = checkpoint.get("images_per_batch")
        self.training_images = checkpoint.get("training_images")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the data loader again at the checkpoint's position."""
        if trainer.ckpt_path is None:
            return
        if self.training_images not in (None, images := _training_images(trainer)):
            log.warning(
                "resume: the data has %d training images instead of %d; training continues with different batches",
                images,
                self.training_images,
            )
        now = _images_per_batch(trainer)
        if self.images_per_batch not in (None, now):
            done = completed_batches(trainer)
            skip_batches(trainer, done * self.images_per_batch // now - done)
        epoch, batches = next_batch(trainer)
        loader: Any = trainer.train_dataloader
        loader.sampler.resume(epoch, batches * loader.batch_size)
        reopen_train_loader(trainer)


def _training_images(trainer: L.Trainer) -> int:
    loader: Any = trainer.train_dataloader
    return len(loader.dataset)


def _images_per_batch(trainer: L.Trainer) -> int:
    loader: Any = trainer.train_dataloader
    return loader.batch_size * trainer.world_size
