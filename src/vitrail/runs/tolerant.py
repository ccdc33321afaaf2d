"""Loggers whose server may fail: the training continues without them."""

import logging
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


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
