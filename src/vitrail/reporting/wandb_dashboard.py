"""W&B beyond metrics: a saved workspace for each project, and artifacts with their lineage."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vitrail.errors import ConfigError
from vitrail.reporting.wandb_panels import EPOCH, GROUPS_TABLE, installed_workspaces, panel_groups
from vitrail_runtime.checking import Positive, checked

log = logging.getLogger(__name__)

WORKSPACE = "vitrail"
_SAVED_VIEWS = """
query SavedViews($entityName: String, $name: String, $viewType: String) {
    project(name: $name, entityName: $entityName) { allViews(viewType: $viewType) { edges { node { displayName } } } }
}
"""


@checked
class WandbDashboard(L.Callback):
    """Callback that creates what `logger=wandb` asks for: the workspace "vitrail", and artifacts.

    `logger.wandb.workspace`: after the first epoch with a validation, when the names of all metrics are known. A
    project that has a workspace of this name is left alone. `logger.wandb.artifacts`: label maps as input of the run,
    the best checkpoint as its output. The server is called in threads, so that the training does not wait. A failure
    is a warning. Offline runs get neither, except the checkpoint, which `wandb sync` uploads.

    Args:
        patience: seconds to wait for these threads at the end of the training.
    """

    def __init__(self, patience: Positive = 60.0) -> None:
        self.patience = patience
        self._threads: list[threading.Thread] = []
        self._created = False

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
                self._start("artifacts", upload_label_maps, logger.experiment, Path(maps.store.path))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the workspace once validation metrics are known; this runs after other callbacks have logged."""
        if any(name.startswith("val/") for name in trainer.callback_metrics):
            self._create_workspace(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Upload the best checkpoint, which is completely written by now, and wait for the threads."""
        self._create_workspace(trainer)
        path = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or "nowhere")
        for logger in wandb_loggers(trainer):
            if "best" in logger.artifacts and path.is_file():
                score = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
                metadata = {"score": None if score is None else float(score), "file": path.name}
                self._start("artifacts", upload_best, logger.experiment, path, metadata)
        for thread in self._threads:
            thread.join(self.patience)
            if thread.is_alive():
                log.warning(
                    "%s: the server has not answered within %g s; not waiting longer", thread.name, self.patience
                )

    def _create_workspace(self, trainer: L.Trainer) -> None:
        if self._created:
            return
        self._created = True
        gpus = torch.cuda.device_count() if trainer.strategy.root_device.type == "cuda" else 0
        for logger in wandb_loggers(trainer):
            if logger.workspace and not (logger.experiment.offline or logger.experiment.disabled):
                pictures = list(getattr(logger, "pictures", ()))
                self._start(
                    "workspace", create_workspace, logger.experiment, list(trainer.callback_metrics), pictures, gpus
                )

    def _start(self, key: str, act: Callable[..., None], *arguments: Any) -> None:
        """Call `act` in a thread; a failure is logged with the config key."""

        def attempt() -> None:
            try:
                act(*arguments)
            except Exception as error:  # wandb raises its own errors, those of requests, and built-in ones
                reason = str(error).strip().splitlines() or [type(error).__name__]
                log.warning("logger.wandb.%s: %s; metrics are logged all the same", key, reason[0])

        self._threads.append(threading.Thread(target=attempt, name=f"logger.wandb.{key}", daemon=True))
        self._threads[-1].start()


def wandb_loggers(trainer: L.Trainer) -> list[Any]:
    """Return the trainer's W&B loggers that work; none on other processes than the first."""
    loggers: list[Any] = list(trainer.loggers) if trainer.is_global_zero else []
    return [logger for logger in loggers if hasattr(logger, "workspace") and not logger.failed]


def create_workspace(run: Any, logged: list[str], pictures: list[str], num_gpus: int = 0) -> None:
    """Create the saved workspace "vitrail" in the project of a W&B run, unless it has one.

    Args:
        run: W&B run.
        logged: names of the logged metrics.
        pictures: names of the logged pictures and tables.
        num_gpus: GPUs of the machine.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    workspaces, _ = installed_workspaces()
    if WORKSPACE in _saved_views(run):
        return
    sections = [
        workspaces.Section(name=title, panels=panels, is_open=title != "System")
        for title, panels in panel_groups(logged, pictures, num_gpus).items()
    ]
    workspaces.Workspace(
        entity=run.entity,
        project=run.project,
        name=WORKSPACE,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=EPOCH),
    ).save()


def _saved_views(run: Any) -> set[str]:
    """Return the names of a project's saved workspaces."""
    import wandb
    from wandb_workspaces._graphql import execute_graphql  # works with every version of wandb's client

    variables = {"entityName": run.entity, "name": run.project, "viewType": "project-view"}
    project = execute_graphql(wandb.Api(), _SAVED_VIEWS, variables).get("project")
    if project is None:
        raise ConfigError(f"{run.entity}/{run.project}: no such project on the server, or no access to it")
    return {edge["node"]["displayName"] for edge in project["allViews"]["edges"]}


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
