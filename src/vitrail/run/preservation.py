"""Nothing is lost: checkpoints are written whole or not at all, at intervals and when the process is asked to stop."""

import errno
import logging
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn

from vitrail.errors import ConfigError, TrainingError
from vitrail.models.checkpoints import read_checkpoint
from vitrail.models.shards import FOLDER_KEY
from vitrail.training.classifier import next_batch

log = logging.getLogger(__name__)


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


def lost_process(error: RuntimeError, run: Path) -> TrainingError | None:
    """What PyTorch's error means when a process that this one works with is gone; None for other errors."""
    text, on = str(error), f"resume={run} goes on from the last checkpoint"
    if isinstance(error, TrainingError):
        return None
    if "DataLoader worker (pid" in text:  # else an error within one
        return TrainingError(
            "data.num_workers: a loader process was killed, as for lack of memory; fewer of them or a smaller"
            f" data.batch_size need less. {on}."
        )
    if re.search(r"gloo|nccl|DistBackendError|connection (reset|closed)|timed out", text + repr(error), re.IGNORECASE):
        return TrainingError(f"another process of this training is gone ({text.splitlines()[0][:160]}); {on}.")
    return None


def tell_of_lost_children(run: Path) -> None:
    """Let Lightning's word of a process that ended before the others through, in ours; it then ends all of them."""

    def reword(record: logging.LogRecord) -> bool:
        found = re.search(r"Child process with PID (\d+) terminated with code (-?\d+)", record.getMessage())
        if found:
            record.levelno, record.levelname, record.args = logging.ERROR, "ERROR", ()
            record.msg = (
                f"process {found[1]} of this training ended with status {found[2]}, so all do; resume={run} goes on"
                " from the last checkpoint"
            )
        return found is not None or record.levelno >= logging.WARNING

    logger = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    logger.setLevel(logging.INFO)
    logger.addFilter(reword)


class NextBatch(L.Callback):
    """Let a resumed training begin with the batch that comes next, of the epoch that it is in.

    Lightning opens the loader before it knows where the training was, and counts on it from there. Where the processes
    are more or fewer than before, it goes on after the same images, which are other batches.
    """

    def __init__(self) -> None:
        self.images_per_batch: int | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep how many images a batch has, on all processes."""
        checkpoint["images_per_batch"] = _images_per_batch(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read it."""
        self.images_per_batch = checkpoint.get("images_per_batch")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the loader again where the checkpoint says."""
        if trainer.ckpt_path is None:
            return
        now = _images_per_batch(trainer)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if self.images_per_batch not in (None, now):
            more = progress.ready * self.images_per_batch // now - progress.ready
            for count in ("ready", "started", "processed", "completed"):
                setattr(progress, count, getattr(progress, count) + more)
        epoch, batches = next_batch(trainer)
        loader: Any = trainer.train_dataloader
        loader.sampler.go_on(epoch, batches * loader.batch_size)
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _images_per_batch(trainer: L.Trainer) -> int:
    return trainer.datamodule.batch_size * trainer.world_size  # type: ignore[attr-defined]


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The process was asked to stop, and everything is saved; `signum` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    def status(self, trainer: L.Trainer) -> int:
        """What the process exits with: 128 + the signal, but 0 where others would take that for a failure.

        Lightning kills the process that started the others when one of these fails, and torchrun starts all again.
        """
        cluster = getattr(trainer.strategy, "cluster_environment", None)
        helps = trainer.local_rank > 0 and cluster is not None and not cluster.creates_processes_externally
        restarts = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        return 0 if helps or restarts else 128 + self.signum


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


class KeepWork(Checkpoint):
    """Write a checkpoint after every epoch, every so often within, and when asked to stop.

    A training that is resumed from it goes on as if nothing had been.

    SIGTERM, SIGUSR1 and Ctrl-C let the running optimiser step end (the last one of an epoch: its validation), on all
    processes, whichever of them was asked; then all save and raise `Stopped`. A second Ctrl-C ends at once. From
    elsewhere, a file asks for it: at the end of an epoch, as SIGTERM.

    Args:
        path: the checkpoint.
        minutes: between two of them within an epoch; None for none.
        stop: the file that asks to stop; removed at the start.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, path: str | Path, minutes: float | None = 15, stop: str | Path | None = None) -> None:
        self.path, self.minutes, self.stop = Path(path), minutes, Path(stop) if stop else None
        self._asked = 0
        self._before: Mapping[int, Any] = {}
        self._saved = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; in place of Lightning's handler, which talks to the other processes from within the signal."""
        self._saved = time.monotonic()
        if self.stop and trainer.is_global_zero:
            self.stop.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._ask) for signum in self.signals}

    def _ask(self, signum: int, _: Any) -> None:
        if signum == signal.SIGINT and self._asked == signal.SIGINT:
            os._exit(128 + signum)
        self._asked = signum
        name = signal.Signals(signum).name
        # Not by logging or print, in the midst of which the signal may have come.
        os.write(2, f"\n{name}: saving after this step{', again: at once' * (signum == signal.SIGINT)}\n".encode())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimiser steps; after an epoch's last one, validation saves."""
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        asked, due = self._agree(trainer)
        if asked or due:
            self._save(trainer)
        if asked:
            self._end(trainer, asked)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after every epoch and its validation; Lightning's `save_last` does only where the best improved."""
        if self.stop and trainer.is_global_zero and self.stop.is_file():
            self._asked = self._asked or signal.SIGTERM
        asked, _ = self._agree(trainer)
        self._save(trainer)
        if asked and trainer.current_epoch + 1 < (trainer.max_epochs or math.inf):  # else it ends by itself
            self._end(trainer, asked)

    @staticmethod
    def _end(trainer: L.Trainer, asked: int) -> NoReturn:
        """Wait until the first process has written: who starts processes may kill all when one of them has ended."""
        trainer.strategy.checkpoint_io.teardown()
        trainer.strategy.barrier("stopped")
        raise Stopped(asked)

    def _agree(self, trainer: L.Trainer) -> tuple[int, bool]:
        """By which signal any process was asked to stop (0: none), and whether the first one's clock says to save."""
        due = self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes
        if trainer.world_size == 1:
            return self._asked, due
        wishes = torch.tensor([self._asked, int(due and trainer.is_global_zero)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
        asked, together = wishes.tolist()
        return int(asked), bool(together)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
