"""The metrics that say how good a run is."""

from collections.abc import Collection

MAIN_METRICS = ("val/top1", "val/mIoU")
"""The metric of each task, in the order of preference."""


def default_metric(known: Collection[str]) -> str:
    """Return the main metric that runs have, of the metrics that are `known`; the first if they have none."""
    return next((metric for metric in MAIN_METRICS if metric in known), MAIN_METRICS[0])
