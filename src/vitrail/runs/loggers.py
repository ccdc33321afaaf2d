"""Loggers: always a CSV file; W&B, TensorBoard and MLflow on request."""

import csv
import logging
import netrc
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vitrail.errors import ConfigError
from vitrail.runs.directory import is_rank_zero
from vitrail_runtime.checking import checked
from vitrail_runtime.secrets import redacted_arguments

log = logging.getLogger(__name__)

_WANDB_SERVER = "https://api.wandb.ai"


class MetricsCSV(Logger):
    """Logger that writes one row per epoch to `metrics.csv`; a resumed run appends to the same file.

    Lightning's CSVLogger writes several rows per epoch, and deletes the file when a run is resumed.

    Args:
        path: CSV file.
    """

    name = None
    version = None

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._warned = False
        self.rows: dict[int, dict[str, float]] = {}
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    values = {key: float(value) for key, value in row.items() if value}
                    self.rows[int(values["epoch"])] = values

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the config is saved in the run directory."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of their epoch."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if "epoch" not in metrics or not values:
            return
        epoch = int(metrics["epoch"])
        self.rows.setdefault(epoch, {"epoch": epoch}).update(values)
        self.rows[epoch]["step"] = step if step is not None else 0

    @rank_zero_only
    def save(self) -> None:
        """Rewrite the file with all rows; if that fails, the next call tries again with all rows."""
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                log.warning("%s: cannot be written (%s); will retry after each epoch", self.path, error.strerror)
            self._warned = True

    def _write(self) -> None:
        """Write the file atomically."""
        columns = ["epoch", "step", *sorted({key for row in self.rows.values() for key in row} - {"epoch", "step"})]
        unfinished = self.path.with_name(f".{self.path.name}")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for epoch in sorted(self.rows):
                row = self.rows[epoch]
                writer.writerow({key: int(row[key]) if key in ("epoch", "step") else f"{row[key]:.6g}" for key in row})
        unfinished.replace(self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the file for the last time.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            self._write()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def best(self, metric: str, by: str | None = None) -> float | None:
        """Return the highest value of `metric` over all epochs; None if it was never logged.

        With `by`, it is the value in the epoch in which that metric is highest.
        """
        rows = [row for row in self.rows.values() if metric in row and (by or metric) in row]
        best = max(rows, key=lambda row: row[by or metric], default=None)
        return None if best is None else best[metric]


class Tolerant(Logger):
    """Mixin for loggers that may lose their server: a failure disables the logger, and the training continues.

    The metrics are in `metrics.csv` in any case.
    """

    failed = False

    def attempt(self, act: Callable[[], Any]) -> None:
        """Call `act` unless this logger has failed before; log a warning at the first failure."""
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # each package raises its own error types
            self.failed = True
            reason = str(error).strip().splitlines() or [type(error).__name__]
            kind = type(self).__name__.removesuffix("Logger")
            log.warning(
                "%s failed (%s); the run continues without it, and metrics.csv has all metrics", kind, reason[0]
            )

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics, unless the logger has failed."""
        self.attempt(lambda: super(Tolerant, self).log_metrics(metrics, step))  # type: ignore[safe-super]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters, unless the logger has failed."""
        self.attempt(lambda: super(Tolerant, self).log_hyperparams(*args, **kwargs))  # type: ignore[safe-super]

    def save(self) -> None:
        """Save, unless the logger has failed."""
        self.attempt(lambda: super(Tolerant, self).save())

    def finalize(self, status: str) -> None:
        """Finalise, unless the logger has failed."""
        self.attempt(lambda: super(Tolerant, self).finalize(status))


def tolerant(logger: Any) -> Any:
    """Add `Tolerant` to one of Lightning's loggers, in place; its class keeps its name."""
    kind = type(logger)
    logger.__class__ = type(kind.__name__, (Tolerant, kind), {})
    return logger


@checked
def wandb(
    run_dir: str, project: str | None = None, entity: str | None = None, finish_timeout: float = 300, **kwargs: Any
) -> WandbLogger:
    """Create a Weights & Biases logger: online if there is a key and a connection, otherwise offline.

    Offline runs are stored in the run directory. The W&B run id is saved in `wandb_id.txt`, so that a resumed training
    continues the same W&B run.

    Args:
        run_dir: run directory.
        project: W&B project.
        entity: W&B user or team.
        finish_timeout: seconds to wait at the end for the upload to finish; metrics.csv has the metrics in any case.
        kwargs: further arguments of `wandb.init` (`tags`, `notes`, `group`, ...).

    Raises:
        ConfigError: `WANDB_MODE` is invalid.
    """
    import wandb as package

    directory = Path(run_dir)
    id_file = directory / "wandb_id.txt"
    if is_rank_zero() and not id_file.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        id_file.write_text(secrets.token_hex(4))

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

    mode, reason = _wandb_mode()
    if mode == "online" and is_rank_zero():
        try:
            online = logger("online")
            with redacted_arguments():
                _ = online.experiment  # connects and sends the command line
            return tolerant(online)
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
            _ = offline.experiment
    return tolerant(offline)


def _wandb_mode() -> tuple[str, str | None]:
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


@checked
def tensorboard(run_dir: str, **kwargs: Any) -> TensorBoardLogger:
    """Create a logger of TensorBoard event files in the run directory.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        return tolerant(TensorBoardLogger(save_dir=run_dir, name="", version="tensorboard", **kwargs))
    except ModuleNotFoundError as error:
        raise ConfigError("logger=tensorboard: not installed; run pip install 'vitrail[tracking]'.") from error


@checked
def mlflow(run_dir: str, experiment: str, tracking_uri: str, **kwargs: Any) -> MLFlowLogger:
    """Create a logger for an MLflow server or database; the run id is saved in `mlflow_id.txt` for resuming.

    Args:
        run_dir: run directory; its name becomes the name of the MLflow run.
        experiment: MLflow experiment.
        tracking_uri: address of the server, or `sqlite:///<file>`.
        kwargs: further arguments of Lightning's MLFlowLogger.

    Raises:
        ConfigError: MLflow is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # no usage reports without consent
    if tracking_uri.startswith("sqlite:///"):  # by default MLflow writes pictures to the working directory
        kwargs.setdefault("artifact_location", str(Path(tracking_uri.removeprefix("sqlite:///")).parent / "mlruns"))
    directory = Path(run_dir)
    id_file = directory / "mlflow_id.txt"
    try:
        logger = MLFlowLogger(
            experiment_name=experiment,
            tracking_uri=tracking_uri,
            run_name=directory.name,
            run_id=id_file.read_text().strip() if id_file.is_file() else None,
            **kwargs,
        )
    except ModuleNotFoundError as error:
        raise ConfigError("logger=mlflow: not installed; run pip install 'vitrail[tracking]'.") from error
    if is_rank_zero() and not id_file.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        id_file.write_text(logger.run_id or "")
    return tolerant(logger)
