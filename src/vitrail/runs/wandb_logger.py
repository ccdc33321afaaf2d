"""Logger for Weights & Biases: online if possible, otherwise offline."""

import logging
import netrc
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

from vitrail.errors import ConfigError
from vitrail.runs.directory import is_rank_zero
from vitrail.runs.tolerant import tolerant
from vitrail_runtime.checking import checked
from vitrail_runtime.secrets import redacted_arguments

log = logging.getLogger(__name__)

_WANDB_SERVER = "https://api.wandb.ai"


@checked
def wandb(
    run_dir: str,
    project: str | None = None,
    entity: str | None = None,
    finish_timeout: float = 300,
    workspace: bool = True,
    artifacts: Sequence[Literal["best", "label_maps"]] = (),
    **kwargs: Any,
) -> WandbLogger:
    """Create a Weights & Biases logger: online if there is a key and a connection, otherwise offline.

    Offline runs are stored in the run directory. The W&B run id is saved in `wandb_id.txt`, so that a resumed training
    continues the same W&B run. The x-axis of all metrics is the epoch. The summary of accuracies and validation losses
    is their best value. `vitrail.reporting.WandbDashboard` reads the attributes `workspace` and `artifacts`.

    Args:
        run_dir: run directory.
        project: W&B project.
        entity: W&B user or team.
        finish_timeout: seconds to wait at the end for the upload to finish; metrics.csv has the metrics in any case.
        workspace: create the saved workspace "vitrail" if the project has none, or add panels that it does not have.
        artifacts: what to upload as W&B artifacts: the best checkpoint, the label maps.
        kwargs: further arguments of `wandb.init` (`tags`, `notes`, `group`, ...).

    Raises:
        ConfigError: `WANDB_MODE` is invalid.
    """
    import wandb as package
    from wandb.env import RUN_ID

    directory = Path(run_dir)
    id_file = directory / "wandb_id.txt"
    if is_rank_zero() and not id_file.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        # An agent of a W&B sweep has chosen the id, and W&B ignores any other.
        id_file.write_text(os.environ.get(RUN_ID) or secrets.token_hex(4))

    def logger(mode: str) -> WandbLogger:
        return WandbLogger(
            save_dir=run_dir,
            name=directory.name,
            id=id_file.read_text().strip() if id_file.is_file() else None,
            project=project,
            entity=entity,
            resume="allow",
            # A server that does not answer must not block the training.
            settings=package.Settings(
                mode=mode, init_timeout=20, finish_timeout=finish_timeout, silent=mode != "online", console="off"
            ),
            **kwargs,
        )

    mode, reason = wandb_mode()
    if mode == "online" and is_rank_zero():
        try:
            online = logger("online")
            with redacted_arguments():
                _define_metrics(online.experiment)  # connects and sends the command line
            return _declaring(online, workspace, artifacts)
        except Exception as error:  # wandb raises its own errors, those of requests, and built-in ones
            package.teardown()  # otherwise the run id would still be in use
            mode, reason = "offline", f"the server refused or did not answer ({str(error).splitlines()[0]})"
    if reason:
        log.warning(
            "logger=wandb: %s; the run is stored offline. Upload it with `wandb sync %s/wandb/*`.", reason, run_dir
        )
    offline = logger(mode)
    if is_rank_zero():
        with redacted_arguments():
            _define_metrics(offline.experiment)
    return _declaring(offline, workspace, artifacts)


def _declaring(logger: WandbLogger, workspace: bool, artifacts: Sequence[str]) -> WandbLogger:
    """Return a tolerant logger that declares what to create on the server besides the run."""
    declaring = tolerant(logger)
    declaring.workspace, declaring.artifacts = workspace, tuple(artifacts)
    return declaring


def _define_metrics(run: Any) -> None:
    """Make the epoch the x-axis of all metrics, and the best value of a validation metric its summary.

    Each is named, because wandb ignores the summary of a pattern.
    """
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch", step_sync=True, overwrite=True)
    for weights in ("", "_ema"):
        for name in ("top1", "top5", "mIoU", "mAcc", "aAcc", "loss"):
            best = "min" if name == "loss" else "max"
            run.define_metric(f"val/{name}{weights}", step_metric="epoch", summary=best)


def wandb_mode() -> tuple[str, str | None]:
    """Return W&B's mode, and the reason if it is offline although nobody asked for that.

    This is decided before wandb starts: online and without a network, wandb blocks for minutes and then raises.
    """
    if chosen := os.environ.get("WANDB_MODE"):
        if chosen not in ("online", "offline", "disabled", "shared"):
            raise ConfigError(f"WANDB_MODE={chosen}: must be online, offline or disabled.")
        if chosen != "online":
            return chosen, None
    server = urlparse(os.environ.get("WANDB_BASE_URL") or _WANDB_SERVER)
    if not os.environ.get("WANDB_API_KEY") and not _has_netrc_entry(server.hostname or ""):
        return "offline", "no API key (WANDB_API_KEY in .env, or `wandb login`)"
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((server.hostname or "", port), timeout=3).close()
    except OSError:
        return "offline", f"{server.hostname} cannot be reached"
    return "online", None


def _has_netrc_entry(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
