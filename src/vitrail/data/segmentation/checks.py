"""Checks of images with masks, before a training and for `src/doctor.py`."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.label_maps.checks import Finding
from vitrail.data.sampling import sample_of
from vitrail.data.segmentation.values import MaskCheck, occurring
from vitrail.errors import ConfigError, ImageError
from vitrail.types import MASK_IGNORE

log = logging.getLogger(__name__)

_RARE = 1e-4  # share of the labelled pixels
_NAMED = 5
_THREADS = 8


class PairChecks(NamedTuple):
    """What the checks of several images and masks found."""

    errors: list[str]
    turned: list[str]
    """Keys of the images that their EXIF orientation turns or mirrors."""
    occurs: np.ndarray
    """(256,) whether a class occurs in any of the masks, or `MASK_IGNORE`."""


def check_pairs(split: Any, indices: Sequence[int]) -> PairChecks:
    """Check images and masks.

    Args:
        split: images and masks. A split without a method `check` is read as a whole.
        indices: samples to check.
    """
    keys = split.keys()
    found = PairChecks([], [], np.zeros(MASK_IGNORE + 1, bool))

    def outcome(index: int) -> MaskCheck | str:
        try:
            return split.check(index) if hasattr(split, "check") else MaskCheck(False, occurring(split[index].mask))
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS) as pool:
        for index, result in zip(indices, pool.map(outcome, indices), strict=True):
            if isinstance(result, str):
                found.errors.append(result)
                continue
            found.occurs[:] |= result.occurs
            if result.is_turned:
                found.turned.append(keys[index])
    return found


def joined(parts: Sequence[PairChecks]) -> PairChecks:
    """Join what several processes found."""
    errors, turned, occurs = zip(*parts, strict=True)
    return PairChecks(sorted(chain(*errors)), sorted(chain(*turned)), np.any(occurs, 0))


def check_classes(source: Any, occurs: np.ndarray) -> None:
    """Refuse training masks with a single class, and warn about classes that occur in none.

    Args:
        source: source of the masks.
        occurs: (256,) whether a class occurs in any training mask, or `MASK_IGNORE`.

    Raises:
        ConfigError: there is only one class.
    """
    names = source.classes
    missing = [name for name, does in zip(names, occurs, strict=False) if not does]
    if len(missing) == len(names) - 1 > 0:
        (only,) = set(names) - set(missing)
        hint = ""
        if occurs[MASK_IGNORE] and getattr(getattr(source, "table", None), "ignores_only_255", False):
            hint = " and the value 255, which is not labelled; if it is a class, set 'data.source.map={0:0,255:1}'"
        raise ConfigError(f"data.source: all training masks have only the class {only}{hint}.")
    if missing:
        log.warning("%d of %d classes occur in no training mask: %s", len(missing), len(names), _listed(missing))


def class_pixels(split: Any, indices: Sequence[int], num_classes: int) -> tuple[np.ndarray, list[str]]:
    """Count the labelled pixels of each class (C + 1,), those without label last, and collect the errors.

    Args:
        split: images and masks.
        indices: samples to read.
        num_classes: number of classes, C.
    """
    counts, errors = np.zeros(num_classes + 1, np.int64), []
    for index in indices:
        try:
            mask = split[int(index)].mask
        except ImageError as error:
            errors.append(str(error))
            continue
        found = np.bincount(mask.ravel(), minlength=MASK_IGNORE + 1)
        counts += np.append(found[:num_classes], found[MASK_IGNORE])
    return counts, errors


def check_masks(name: str, split: Any, source: Any, sample: int) -> Iterator[Finding]:
    """Yield the findings about a split: pairs, values and sizes, class shares, and the camera's orientation.

    Args:
        name: `train` or `val`.
        split: its images and masks.
        source: source of the split.
        sample: images to read.
    """
    indices = [int(index) for index in sample_of(len(split), sample)]
    _, alone = source.pairs(name)
    if spare := source.masks_alone(name):
        yield Finding(f"{name} pairs", "warning", f"{len(spare)} masks have no image, the first is {spare[0]}")
    elif alone:
        yield Finding(f"{name} pairs", "warning", f"{len(alone)} images without mask are skipped")
    else:
        yield Finding(f"{name} pairs", "ok", "every image has a mask and every mask an image")
    counts, errors = class_pixels(split, indices, len(source.classes))
    if not errors:  # otherwise reported with the images
        yield Finding(f"{name} masks", "ok", f"{len(indices)} read; sizes agree, all values are classes or ignored")
    if counts.any():
        yield _shares(name, counts, source.classes)
    if turned := check_pairs(split, indices).turned:
        text = f"{len(turned)} images are turned by their EXIF orientation, the first is {turned[0]}"
        yield Finding(f"{name} orientation", "warning", text, "make sure that their masks are upright too")


def _shares(name: str, counts: np.ndarray, classes: list[str]) -> Finding:
    """Report the share of each class among the labelled pixels."""
    labelled, shares = counts[:-1].sum(), counts[:-1] / max(1, counts[:-1].sum())
    order = np.argsort(-shares)
    largest = ", ".join(f"{classes[index]} {100 * shares[index]:.1f} %" for index in order[:3])
    text = f"{100 * counts[-1] / max(1, counts.sum()):.1f} % of the pixels are not labelled; of the others {largest}"
    rare = [classes[index] for index in np.flatnonzero(shares < _RARE)]
    if labelled and rare:
        text += f"; {len(rare)} classes have less than {100 * _RARE:g} %: {_listed(rare)}"
        return Finding(f"{name} classes", "warning", text, "expect a low IoU, or check the table of values")
    return Finding(f"{name} classes", "ok", text)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
