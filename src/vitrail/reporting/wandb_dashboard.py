"""W&B beyond metrics: a saved workspace for each project, and artifacts with their lineage."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vitrail_runtime.checking import Positive, checked

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds


@checked
class WandbDashboard(L.Callback):
    """Callback that creates what `logger=wandb` asks for: the workspace "vitrail", and artifacts.

    `logger.wandb.workspace`: after the first epoch with a validation, when the names of the metrics are known; later
    epochs, and later runs of the project, add panels of what they log for the first time. `logger.wandb.artifacts`:
    label maps as input of the run, the best checkpoint as its output. The server is called in threads, so that the
    training does not wait. A failure is a warning. Offline runs get neither, except the checkpoint, which `wandb sync`
    uploads.

    Args:
        patience: seconds to wait for these threads at the end of the training.
    """

    def __init__(self, patience: Positive = PATIENCE) -> None:
        self.patience = patience
        self._threads: list[threading.Thread] = []
        self._shown: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the optimiser's parameter groups, and upload the label maps."""
        for logger in wandb_loggers(trainer):
            if trainer.global_step == 0:
                _log_groups(logger, trainer.optimizers[0])
            maps = getattr(getattr(trainer.datamodule, "train", None), "maps", None)  # type: ignore[attr-defined]
            if "label_maps" not in logger.artifacts:
                continue
            if maps is None:
                log.warning("logger.wandb.artifacts: label_maps: data.label_maps is not set; nothing to upload")
            elif logger.experiment.offline:
                log.warning("logger.wandb.artifacts: label_maps: not recorded, because this run is offline")
            else:
                self._threads.append(_start("artifacts", upload_label_maps, logger.experiment, Path(maps.store.path)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update the workspace once validation metrics are known; this runs after other callbacks have logged."""
        if any(name.startswith("val/") for name in trainer.callback_metrics):
            self._show(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Upload the best checkpoint, which is completely written by now, and wait for the threads."""
        self._show(trainer)
        path = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or "nowhere")
        for logger in wandb_loggers(trainer):
            if "best" in logger.artifacts and path.is_file():
                score = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
                metadata = {"score": None if score is None else float(score), "file": path.name}
                self._threads.append(_start("artifacts", upload_best, logger.experiment, path, metadata))
        _wait(self._threads, self.patience)

    def _show(self, trainer: L.Trainer) -> None:
        """Update the workspace if something has been logged for the first time."""
        loggers = wandb_loggers(trainer)
        pictures = [name for logger in loggers for name in getattr(logger, "pictures", ())]
        logged = set(trainer.callback_metrics)
        if {*logged, *pictures} <= self._shown:
            return
        self._shown |= {*logged, *pictures}
        gpus = torch.cuda.device_count() if trainer.strategy.root_device.type == "cuda" else 0
        self._threads += _update_workspaces(loggers, logged, pictures, gpus)


def show_evaluation(loggers: Iterable[Any], logged: Collection[str]) -> None:
    """Add panels of an evaluation's metrics to the workspaces "vitrail" of W&B loggers; others are ignored.

    A project without this workspace gets none. A failure is a warning.

    Args:
        loggers: loggers of any kind.
        logged: names of the metrics.
    """
    _wait(_update_workspaces(_working(loggers), logged, (), 0, False), PATIENCE)


def wandb_loggers(trainer: L.Trainer) -> list[Any]:
    """Return the trainer's W&B loggers that work; none on other processes than the first."""
    return _working(trainer.loggers) if trainer.is_global_zero else []


def _working(loggers: Iterable[Any]) -> list[Any]:
    return [logger for logger in loggers if hasattr(logger, "workspace") and not logger.failed]


def _update_workspaces(loggers: Iterable[Any], *shown: Any) -> list[threading.Thread]:
    """Update the workspaces of loggers that are online and want one; `shown` are `update_workspace`'s arguments."""
    runs = [logger.experiment for logger in loggers if logger.workspace]
    if not runs:
        return []
    from vitrail.reporting.wandb_workspace import update_workspace

    return [_start("workspace", update_workspace, run, *shown) for run in runs if not (run.offline or run.disabled)]


def _start(key: str, act: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Call `act` in a thread; a failure is logged with the config key."""

    def attempt() -> None:
        try:
            act(*arguments)
        except Exception as error:  # wandb raises its own errors, those of requests, and built-in ones
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("logger.wandb.%s: %s; metrics are logged all the same", key, reason[0])

    thread = threading.Thread(target=attempt, name=f"logger.wandb.{key}", daemon=True)
    thread.start()
    return thread


def _wait(threads: Iterable[threading.Thread], patience: float) -> None:
    """Wait until threads have ended, `patience` seconds at most."""
    deadline = time.monotonic() + patience
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("%s: the server has not answered within %g s; not waiting longer", thread.name, patience)


def upload_label_maps(run: Any, path: Path) -> None:
    """Upload a folder of label maps as an artifact that the run uses; unchanged files are not sent again."""
    import wandb

    artifact = wandb.Artifact(name=path.name, type="label_maps")
    artifact.add_dir(str(path))
    run.use_artifact(artifact)


def upload_best(run: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Upload a checkpoint as the model that the run has made."""
    import wandb

    artifact = wandb.Artifact(name=f"model-{run.id}", type="model", metadata=metadata)
    artifact.add_file(str(path), name="best.ckpt")
    run.log_artifact(artifact, aliases=["best"])


def _log_groups(logger: Any, optimizer: torch.optim.Optimizer) -> None:
    """Log a table of the optimiser's groups: those with the same learning rate and weight decay are one row."""
    from vitrail.reporting.wandb_panels import GROUPS_TABLE

    rows: dict[tuple[float, float], list[int]] = {}
    for group in optimizer.param_groups:
        key = float(group.get("lr_scale", 1.0)), float(group.get("weight_decay", 0.0))
        counts = rows.setdefault(key, [0, 0])
        counts[0] += len(group["params"])
        counts[1] += sum(parameter.numel() for parameter in group["params"])
    table = [[*key, *counts] for key, counts in sorted(rows.items())]
    columns = ["lr_scale", "weight_decay", "tensors", "parameters"]
    logger.attempt(lambda: logger.log_table(GROUPS_TABLE, columns=columns, data=table))
    logger.pictures = [*getattr(logger, "pictures", ()), GROUPS_TABLE]
