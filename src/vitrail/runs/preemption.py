"""Save when asked to stop, and at intervals, so that a preempted training resumes exactly."""

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from vitrail.errors import TrainingError
from vitrail_runtime.compat import is_accumulating, is_last_batch

log = logging.getLogger(__name__)


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


class Preemption(Checkpoint):
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
        if is_last_batch(trainer) or is_accumulating(trainer):
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


def explain_dead_children(run: Path) -> None:
    """Reword Lightning's message about a dead child process, after which it ends all of them."""

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
