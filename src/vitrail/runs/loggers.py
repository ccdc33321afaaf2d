"""Loggers: always a CSV file; W&B, TensorBoard and MLflow on request."""

import csv
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from vitrail.errors import ConfigError
from vitrail.runs.config import instantiate
from vitrail.runs.directory import is_rank_zero
from vitrail.runs.tolerant import tolerant
from vitrail_runtime.checking import checked
from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.runs.wandb_logger import wandb
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["MetricsCSV", "mlflow", "tensorboard", "wandb"]

log = logging.getLogger(__name__)


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


def continue_loggers(nodes: Mapping[str, Any] | None, run_dir: Path) -> list[Any]:
    """Build the loggers of the config's `logger`, which continue the run that is recorded in `run_dir`.

    Raises:
        ConfigError: an option is invalid, or a package is missing.
    """
    return [instantiate(node, f"logger.{key}", run_dir=str(run_dir)) for key, node in (nodes or {}).items()]


def log_results(loggers: Iterable[Any], name: str, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Log the results of an evaluation as `eval/<name>/top1`, `eval/<name>/top1_ema` and so on; return these names.

    Args:
        loggers: loggers; their `finalize` is called afterwards.
        name: name of the data.
        results: numbers by name, for `raw` and `ema` weights.
    """
    metrics = {
        f"eval/{name}/{metric}{'_ema' if weights == 'ema' else ''}": float(value)
        for weights, summary in results.items()
        for metric, value in summary.items()
        if isinstance(value, (int, float))
    }
    for logger in loggers:
        logger.log_metrics(metrics)
        logger.finalize("success")
    return list(metrics)


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
