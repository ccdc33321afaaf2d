"""Checkpoints are written whole or not at all."""

import errno
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from vitrail.checkpoints.reading import read_checkpoint
from vitrail.checkpoints.shards import FOLDER_KEY
from vitrail.errors import ConfigError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its target, to the disk, and only then in its place.

    Whatever happens, the target is the old checkpoint or the new one. Lightning's own goes through a temporary folder,
    which may lie on another file system, so that a process killed while it copies leaves half a file.

    The training waits while its tensors are copied to memory, and goes on while a thread writes them; before a second
    copy it waits for the first to be written. An error is raised by what comes next: another save, `finish`, the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy `checkpoint`, and begin to write it to `path`.

        Raises:
            ConfigError: the disk is full, or not to be written to; what was there before is still there.
        """
        self.finish()
        self._writing = self._thread.submit(_write, _copied(checkpoint, {}), Path(path))

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            ConfigError: as `save_checkpoint`.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def teardown(self) -> None:
        """At the end of a training, whatever ended it."""
        self.finish()

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint; not while it is being written."""
        self.finish()
        super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU, put together where several processes wrote it; nothing in it is executed.

        Raises:
            ConfigError: it cannot be read.
        """
        self.finish()
        return read_checkpoint(path)


def _copied(tree: Any, seen: dict[int, Tensor]) -> Any:
    """A copy of `tree` on the CPU that the training cannot change; a tensor that is there twice stays one."""
    if isinstance(tree, dict):
        return {key: _copied(value, seen) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value, seen) for value in tree)
    if not isinstance(tree, Tensor) or tree.is_meta:
        return tree
    if id(tree) not in seen:
        seen[id(tree)] = tree.detach().to("cpu", copy=True)
    return seen[id(tree)]


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.*"):  # by a process that was killed while it wrote
            left.unlink()
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
        _sync_folder(target.parent)
        for folder in target.parent.glob(f"{target.name}.shards-*"):  # of the checkpoint that was here before
            if folder.name != checkpoint.get(FOLDER_KEY, {}).get("folder"):
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error in one of its own
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise ConfigError(
            f"{target}: cannot be written ({_reason(error)}); the last good checkpoint is still there, and resume="
            f"{target.parent.parent} goes on from it."
        ) from error


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    """Bring the new name of a file to the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def check_space(folder: Path, model: nn.Module, averaged: bool) -> None:
    """Refuse to start where two checkpoints, and one that is being written, have no room; those there are have theirs.

    Raises:
        ConfigError: names the folder, and what is missing.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    one = parameters * (4 + 8 + (4 if averaged else 0))  # weights, Adam's two moments, average; float32
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = max(3 * one - there, one)
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        gib = 2**30
        raise ConfigError(
            f"paths.logs: {folder} has {free / gib:.2f} GiB left, checkpoints need {needed / gib:.2f}; make room, or"
            " set paths.logs (VITRAIL_LOGS) to another disk."
        )


class BestCheckpoints(ModelCheckpoint):
    """Keep the best checkpoints; `best.ckpt` is always the best of all.

    With more than one they are `best-<epoch>.ckpt`, and `best.ckpt` a link. (Lightning would write them all to one
    name, which then holds the last that was among the best.)

    Args:
        dirpath: folder.
        monitor: metric that says what is best.
        mode: `max` or `min`.
        save_top_k: how many to keep; -1 keeps all.
        options: further arguments of Lightning's callback.
    """

    def __init__(
        self, dirpath: str | Path, monitor: str, mode: str = "max", save_top_k: int = 1, **options: Any
    ) -> None:
        super().__init__(
            dirpath,
            "best" if save_top_k == 1 else "best-{epoch:03d}",
            monitor,
            mode=mode,
            save_top_k=save_top_k,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            **options,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and let the link follow once what it points to is written."""
        super().on_validation_end(trainer, pl_module)
        best = Path(self.best_model_path)
        if self.save_top_k == 1 or not self.best_model_path or not trainer.is_global_zero:
            return
        link, unfinished = best.with_name("best.ckpt"), best.with_name(".best.ckpt.link")
        if link.is_symlink() and link.readlink().name == best.name:
            return
        trainer.strategy.checkpoint_io.teardown()
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(best.name)
        unfinished.replace(link)
