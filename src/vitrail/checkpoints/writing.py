"""Write checkpoints atomically and in the background, check disk space, and keep the best checkpoints."""

import errno
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from vitrail.checkpoints.reading import read_checkpoint
from vitrail.checkpoints.shards import FOLDER_KEY
from vitrail.errors import ConfigError
from vitrail_runtime.checking import Range, checked


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes to a temporary file next to the target, flushes it to disk, and renames it.

    The target is always either the complete old checkpoint or the complete new one. Lightning's own IO uses a temporary
    folder, which may be on another file system; a process that is killed during the copy then leaves a partial file.

    Training waits while tensors are copied to CPU memory, and continues while a thread writes them. A second save waits
    until the first is written. An error of the thread is raised by the next save, `finish` or `teardown`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy `checkpoint` to memory and start writing it to `path`.

        Raises:
            ConfigError: the previous write failed (disk full, no permission); the checkpoint before it still exists.
        """
        self.finish()
        self._writing = self._thread.submit(_write, _copy_to_cpu(checkpoint, {}), Path(path))

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            ConfigError: as `save_checkpoint`.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def teardown(self) -> None:
        """Wait until everything is written; called when training ends or fails."""
        self.finish()

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, after waiting for writes in progress."""
        self.finish()
        super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU, merging its shards if there are any, without executing any code in it.

        Raises:
            ConfigError: the checkpoint cannot be read.
        """
        self.finish()
        return read_checkpoint(path)


def _copy_to_cpu(tree: Any, seen: dict[int, Tensor]) -> Any:
    """Copy `tree` to the CPU, so that training cannot change it; a tensor that occurs twice is copied once."""
    if isinstance(tree, dict):
        return {key: _copy_to_cpu(value, seen) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copy_to_cpu(value, seen) for value in tree)
    if not isinstance(tree, Tensor) or tree.is_meta:
        return tree
    if id(tree) not in seen:
        seen[id(tree)] = tree.detach().to("cpu", copy=True)
    return seen[id(tree)]


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.*"):  # left by a process that was killed during a write
            leftover.unlink()
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
        _sync_folder(target.parent)
        for folder in target.parent.glob(f"{target.name}.shards-*"):  # shards of the previous checkpoint
            if folder.name != checkpoint.get(FOLDER_KEY, {}).get("folder"):
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # PyTorch's writer wraps the system's error in a RuntimeError
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise ConfigError(
            f"{target}: cannot be written ({_reason(error)}). The last good checkpoint is still there; free disk space"
            f" or fix the permissions, and resume={target.parent.parent} continues from it."
        ) from error


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not support it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def check_space(folder: Path, model: nn.Module, averaged: bool) -> None:
    """Refuse to start if the disk has no room for two checkpoints and a third one being written.

    Existing checkpoints in `folder` count towards the space needed, as they will be replaced.

    Raises:
        ConfigError: there is not enough space; the message names the folder and the sizes.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    one = parameters * (4 + 8 + (4 if averaged else 0))  # weights, Adam's two moments, EMA weights; float32
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = max(3 * one - used, one)
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        gib = 2**30
        raise ConfigError(
            f"paths.logs: {folder} has {free / gib:.2f} GiB left, checkpoints need {needed / gib:.2f}."
            " Free some space, or set paths.logs (VITRAIL_LOGS) to another disk."
        )


@checked
class BestCheckpoints(ModelCheckpoint):
    """Callback that keeps the best checkpoints; `best.ckpt` is always the best of all.

    If it keeps more than one, they are named `best-<epoch>.ckpt`, and `best.ckpt` is a link. (Lightning would write
    them all to one name, which then holds the latest of the best rather than the best.)

    Args:
        dirpath: folder of the checkpoints.
        monitor: metric to compare.
        mode: `max` or `min`.
        save_top_k: number of checkpoints to keep; -1 keeps all.
        options: further arguments of Lightning's callback.
    """

    def __init__(
        self,
        dirpath: str | Path,
        monitor: str,
        mode: Literal["max", "min"] = "max",
        save_top_k: Annotated[int, Range(ge=-1)] = 1,
        **options: Any,
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
        """Save a checkpoint if it is among the best, and update the link once the new best is written."""
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
