"""Find the value range of a data set's image files."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vitrail.data.bit_depth import ValueRange, white_of
from vitrail.data.images import high_bit_depth_values
from vitrail.errors import ConfigError

log = logging.getLogger(__name__)

SAMPLE = 256
"""Files to look at in a data set."""


def given_range(value_range: Sequence[float] | None) -> ValueRange | None:
    """Return the value range that a config gives.

    Raises:
        ConfigError: black is not below white.
    """
    if value_range is None:
        return None
    low, high = value_range
    if not low < high:
        raise ConfigError(f"data.value_range=[{low:g}, {high:g}]: the first must be below the second.")
    return float(low), float(high)


def sampled_range(paths: Sequence[Path]) -> ValueRange | None:
    """Find and log the value range of a sample of files; None if none of them has more than 8 bits per channel."""
    value_range, count = find_value_range(paths)
    if value_range is not None:
        log.info(
            "data.value_range=[%g, %g], found in %d of %d images, which have more than 8 bits per channel",
            *value_range,
            count,
            len(paths),
        )
    return value_range


def find_value_range(paths: Iterable[Path]) -> tuple[ValueRange | None, int]:
    """Find the value range of a data set from a sample of its files.

    The range starts at 0. It ends at 1, 255 or 65535 for floats, and at the largest value of 8, 10, 12, 14 or 16 bits
    for integers: the smallest that holds all values of the sample.

    Args:
        paths: files of the data set; unreadable ones are skipped.

    Returns:
        The range, and the number of files with more than 8 bits; None and 0 if there are none.

    Raises:
        ConfigError: there is no such range; the message names a file and `data.value_range`.
    """
    found: dict[str, tuple[float, float, Path]] = {}
    count = 0
    for path in paths:
        values = high_bit_depth_values(path)
        if values is None or not np.isfinite(values).all():
            continue
        count += 1
        kind, low, high = values.dtype.kind, float(values.min()), float(values.max())
        before = found.get(kind, (low, high, path))
        found[kind] = (min(low, before[0]), max(high, before[1]), path if high >= before[1] else before[2])
    if not found:
        return None, 0
    if len({"f" if kind == "f" else "i" for kind in found}) > 1:
        files = " and ".join(str(path) for *_, path in found.values())
        raise ConfigError(
            f"data.value_range: some images contain integers and some floats ({files}); set it to [low, high]."
        )
    low, high = min(item[0] for item in found.values()), max(item[1] for item in found.values())
    white = white_of(low, high, "i" if "i" in found else next(iter(found)))
    if white is None:
        path = max(found.values(), key=lambda item: item[1])[2]
        raise ConfigError(
            f"data.value_range: values from {low:g} to {high:g} (in {path}, for example) do not show which are black"
            " and white; set it to [low, high]."
        )
    return (0.0, white), count
