"""Colours of classes in pictures."""

import colorsys
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]

_FIRST = ((230, 25, 75), (0, 130, 200), (255, 190, 0), (60, 180, 75), (145, 30, 180), (245, 130, 48), (0, 190, 190))
_HUES, _LIGHTNESSES = 60, (0.25, 0.4, 0.55, 0.75)
_FEW = 24
_EYE = np.array([2, 4, 3])  # weights of R, G and B in the distance of two colours


def class_colours(classes: Iterable[int], total: int) -> dict[int, RGB]:
    """Return a colour for each class that a picture shows.

    Few classes have the same colours in all pictures. Of many, the first ones shown get the most distinct colours.

    Args:
        classes: classes in the order in which they are shown.
        total: number of all classes.
    """
    palette, shown = _palette(), dict.fromkeys(classes)
    numbers = shown if total <= _FEW else range(len(shown))
    return {index: palette[number % len(palette)] for number, index in zip(numbers, shown, strict=True)}


@cache
def _palette() -> list[RGB]:
    """Return the fixed colours, then always the candidate that is farthest from all before it."""
    candidates = np.array(
        [
            [255 * part for part in colorsys.hls_to_rgb(number / _HUES, lightness, 0.8)]
            for number in range(_HUES)
            for lightness in _LIGHTNESSES
        ]
    )
    palette = np.array(_FIRST, dtype=float)
    nearest = np.min([_distances(candidates, colour) for colour in palette], axis=0)
    for _ in range(_HUES * len(_LIGHTNESSES) - len(_FIRST)):
        colour = candidates[nearest.argmax()]
        palette = np.vstack([palette, colour])
        nearest = np.minimum(nearest, _distances(candidates, colour))
    return [(int(red), int(green), int(blue)) for red, green, blue in palette.round()]


def _distances(colours: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return ((colours - other) ** 2 * _EYE).sum(1)
