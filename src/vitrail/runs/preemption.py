"""Save checkpoints at intervals and on stop signals, so that a preempted training resumes exactly."""

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
from lightning.pytorch.callbacks import Checkpoint

from vitrail.errors import TrainingError
from vitrail.runs.poll import Poll
from vitrail_runtime.checking import NonNegative, checked
from vitrail_runtime.compat import ignore_lightnings_signals, is_accumulating, is_last_batch
from vitrail_runtime.sentences import SHARED_MEMORY

log = logging.getLogger(__name__)

_SECONDS = 2.0  # between two questions of the processes to each other


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The training was stopped by signal `signum`, and everything is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    def status(self, trainer: L.Trainer) -> int:
        """Return the exit status: 128 + the signal number, but 0 if a launcher would treat that as a failure.

        If a rank that Lightning has started fails, Lightning kills the main process; torchrun restarts all processes.
        """
        cluster = getattr(trainer.strategy, "cluster_environment", None)
        is_child = trainer.local_rank > 0 and cluster is not None and not cluster.creates_processes_externally
        restarts = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        return 0 if is_child or restarts else 128 + self.signum


@checked
class Preemption(Checkpoint):
    """Callback that writes a checkpoint after every epoch, at intervals within an epoch, and on a stop signal.

    A training that is resumed from the checkpoint continues exactly where it stopped.

    If any process gets SIGTERM, SIGUSR1 or Ctrl-C, all processes finish the current optimiser step (after the last one
    of an epoch, also the validation), save the checkpoint and raise `Stopped`. The processes ask each other for signals
    about every two seconds, and GPUs do not wait for the answer, which is read a step later. A second Ctrl-C exits at
    once. Another program can stop the training by creating the file `stop`: at the end of the epoch it has the effect
    of SIGTERM.

    Args:
        path: checkpoint file.
        minutes: interval between two checkpoints within an epoch; None for none.
        stop: file that stops the training; deleted when the training starts.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, path: str | Path, minutes: NonNegative | None = 15, stop: str | Path | None = None) -> None:
        self.path, self.minutes, self.stop = Path(path), minutes, Path(stop) if stop else None
        self._asked = 0
        self._before: Mapping[int, Any] = {}
        self._saved = time.monotonic()
        self._poll: Poll | None = None
        self._asked_at, self._batches, self._next = self._saved, 0, 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers; Lightning's would communicate in the handler, and at every batch."""
        self._saved = self._asked_at = time.monotonic()
        if self.stop and trainer.is_global_zero:
            self.stop.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._ask) for signum in self.signals}
            ignore_lightnings_signals(trainer)

    def _ask(self, signum: int, _: Any) -> None:
        if signum == signal.SIGINT and self._asked == signal.SIGINT:
            os._exit(128 + signum)
        self._asked = signum
        name = signal.Signals(signum).name
        # No logging or print: they are not reentrant, and the signal may have interrupted one.
        again = "; press Ctrl-C again to exit at once" * (signum == signal.SIGINT)
        os.write(2, f"\n{name}: saving after a step, then stopping{again}\n".encode())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimiser steps; the last step of an epoch is saved after the validation."""
        self._batches += 1
        if is_last_batch(trainer) or is_accumulating(trainer):
            return
        asked, due = self._heard(trainer)
        if asked or due:
            self._save(trainer)
        if asked:
            self._end(trainer, asked)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after every epoch and its validation; Lightning's `save_last` saves only if the metric improved."""
        if self.stop and trainer.is_global_zero and self.stop.is_file():
            self._asked = self._asked or signal.SIGTERM
        asked, _ = self._agree(trainer)
        self._save(trainer)
        if asked and trainer.current_epoch + 1 < (
            trainer.max_epochs or math.inf
        ):  # after the last epoch it ends anyway
            self._end(trainer, asked)

    @staticmethod
    def _end(trainer: L.Trainer, asked: int) -> NoReturn:
        """Wait until the checkpoint is written, then stop: a launcher may kill all processes once one has exited."""
        trainer.strategy.checkpoint_io.teardown()
        trainer.strategy.barrier("stopped")
        raise Stopped(asked)

    def _heard(self, trainer: L.Trainer) -> tuple[int, bool]:
        """Return what is known between two steps: a stop signal (0 for none), and whether a checkpoint is due."""
        if trainer.world_size == 1:
            return self._asked, self._due()
        asked, due = self._answer() if self._poll and self._poll.pending else (0, False)
        if asked or due or self._batches < self._next:
            return asked, due
        return (0, False) if self._ask_others(trainer).late else self._answer()

    def _agree(self, trainer: L.Trainer) -> tuple[int, bool]:
        """Return the stop signal that any process got (0 for none), and whether rank 0's interval has passed."""
        if trainer.world_size == 1:
            return self._asked, self._due()
        if self._poll and self._poll.pending:
            self._answer()  # the new question includes the old one
        self._ask_others(trainer)
        return self._answer()

    def _due(self) -> bool:
        return self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes

    def _ask_others(self, trainer: L.Trainer) -> Poll:
        """Tell the other processes what this one knows, and how many batches the next question may wait for."""
        now = time.monotonic()
        batches = 1 if self.minutes == 0 else int(_SECONDS * self._batches / max(now - self._asked_at, 1e-9))
        self._poll = self._poll or Poll(trainer.strategy.root_device, 3)
        self._poll.ask((self._asked, int(self._due() and trainer.is_global_zero), -max(1, batches)))
        self._asked_at, self._batches = now, 0
        return self._poll

    def _answer(self) -> tuple[int, bool]:
        assert self._poll is not None
        asked, due, fewest = self._poll.answer()
        self._next = -fewest
        return asked, bool(due)

    def _save(self, trainer: L.Trainer) -> None:
        """Save a checkpoint, after callbacks with a method `before_checkpoint(trainer, module)` have called it."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if before_checkpoint := getattr(callback, "before_checkpoint", None):
                before_checkpoint(trainer, trainer.lightning_module)
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


def lost_process(error: RuntimeError, run: Path) -> TrainingError | None:
    """Return an error for the user if PyTorch's error means that another process has died; None for other errors."""
    text, advice = str(error), f"resume={run} continues from the last checkpoint"
    if isinstance(error, TrainingError):
        return None
    if "DataLoader worker (pid" in text and "Bus error" in text:
        return TrainingError(SHARED_MEMORY)
    if "DataLoader worker (pid" in text:  # the worker was killed; an exception raised in it reads differently
        return TrainingError(
            "data.num_workers: a data loader worker was killed, possibly for lack of memory. Lower data.num_workers or"
            f" data.batch_size; {advice}."
        )
    if re.search(r"gloo|nccl|DistBackendError|connection (reset|closed)|timed out", text + repr(error), re.IGNORECASE):
        return TrainingError(f"another process of this run died ({text.splitlines()[0][:160]}); {advice}.")
    return None


def explain_dead_children(run: Path) -> None:
    """Reword Lightning's message about a dead child process, after which Lightning stops all processes."""

    def reword(record: logging.LogRecord) -> bool:
        found = re.search(r"Child process with PID (\d+) terminated with code (-?\d+)", record.getMessage())
        if found:
            record.levelno, record.levelname, record.args = logging.ERROR, "ERROR", ()
            record.msg = (
                f"process {found[1]} of this run exited with status {found[2]}, so all processes stop;"
                f" resume={run} continues from the last checkpoint"
            )
        return found is not None or record.levelno >= logging.WARNING

    logger = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    logger.setLevel(logging.INFO)
    logger.addFilter(reword)
