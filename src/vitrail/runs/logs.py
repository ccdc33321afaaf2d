"""Set up logging: to terminal and log file, without secrets, from rank 0 only."""

import logging
import warnings

from vitrail.runs.directory import is_rank_zero
from vitrail_runtime.secrets import redact_logs

# Warnings about intended behaviour, or about Lightning's own use of PyTorch.
_EXPECTED_WARNINGS = (
    ".*isinstance.treespec, LeafSpec.*",
    "You have overridden `on_after_batch_transfer`.*",
    ".*does not have many workers.*",
    "The number of training batches .* is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    "You're resuming from a checkpoint that ended before the epoch ended.*",  # ResumePosition handles this
    "Found .* in eval mode at the start of training.*",  # the frozen backbone of a linear probe
)


def set_up_logging() -> None:
    """Send Lightning's messages to terminal and log file like vitrail's, redact secrets, and silence other ranks."""
    redact_logs()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a failure to write the log file must not stop the training
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not is_rank_zero():
        for logger_name in (None, "vitrail"):
            logging.getLogger(logger_name).setLevel(logging.WARNING)
