"""Checks of images with masks, before a training and for `src/doctor.py`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vitrail.data.label_maps.checks import Finding
from vitrail.data.sampling import sample_of
from vitrail.errors import ImageError
from vitrail.types import MASK_IGNORE

_RARE = 1e-4  # share of the labelled pixels
_NAMED = 5
_THREADS = 8


def check_pairs(split: Any, indices: Sequence[int]) -> tuple[list[str], list[str]]:
    """Check images and masks, and return the errors and the keys of images that are turned by their EXIF orientation.

    Args:
        split: images and masks. A split without a method `check` is read as a whole.
        indices: samples to check.
    """

    def outcome(index: int) -> tuple[str | None, bool]:
        try:
            return None, _is_turned(split, index)
        except ImageError as error:
            return str(error), False

    with ThreadPoolExecutor(_THREADS) as pool:
        outcomes = list(pool.map(outcome, indices))
    keys = split.keys()
    turned = [keys[index] for index, (_, is_turned) in zip(indices, outcomes, strict=True) if is_turned]
    return [error for error, _ in outcomes if error is not None], turned


def _is_turned(split: Any, index: int) -> bool:
    """Check a sample, and return whether its image is known to be turned."""
    if hasattr(split, "check"):
        return bool(split.check(index))
    split[index]
    return False


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
    if turned := check_pairs(split, indices)[1]:
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
        listed = f"{', '.join(rare[:_NAMED])}{', ...' if len(rare) > _NAMED else ''}"
        text += f"; {len(rare)} classes have less than {100 * _RARE:g} %: {listed}"
        return Finding(f"{name} classes", "warning", text, "expect a low IoU, or check the table of values")
    return Finding(f"{name} classes", "ok", text)
