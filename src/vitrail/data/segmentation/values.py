"""Mask files, and the table from their values to classes.

Shapes: H x W pixels, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrail.errors import ConfigError, ImageError
from vitrail.types import MASK_IGNORE
from vitrail_runtime.checking import RGB, NonNegativeInt, PositiveInt, Range, checked

_VALUES = 2**16  # of a 16-bit PNG
_UNKNOWN = -1
_MAX_CLASSES = MASK_IGNORE
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@checked
class ValueTable:
    """Table from the values in mask files to classes.

    A value becomes `map[value]` if `map` is set, else `value + shift`. The values in `ignore` are not labelled: they
    become `MASK_IGNORE`. So do 255, unless `map` names it, and 0 with a shift of -1. Any other value outside the
    classes is an error.

    Args:
        num_classes: number of classes, C; at most 255.
        shift: added to every value, such as -1 if the classes start at 1.
        map: class of each value, for values without an order; excludes `shift`.
        ignore: values of pixels that are not labelled.
        colours: colour (R, G, B) of each class, for masks that store colours; excludes `shift` and `map`.
        ignore_colours: colours of pixels that are not labelled.

    Raises:
        ConfigError: the options do not fit together, or a class does not exist.
    """

    def __init__(
        self,
        num_classes: PositiveInt,
        shift: int = 0,
        map: Mapping[NonNegativeInt, NonNegativeInt] | None = None,
        ignore: Sequence[Annotated[int, Range(ge=0, lt=_VALUES)]] = (),
        colours: Sequence[RGB] | None = None,
        ignore_colours: Sequence[RGB] = (),
    ) -> None:
        if num_classes > _MAX_CLASSES:
            raise ConfigError(f"data.source.classes: {num_classes} classes; masks hold at most {_MAX_CLASSES}.")
        if shift and map is not None:
            raise ConfigError("data.source.shift: cannot be combined with data.source.map, which names every value.")
        if colours is not None and (shift or map is not None):
            raise ConfigError("data.source.colours: cannot be combined with data.source.shift or data.source.map.")
        if colours is not None and len(colours) != num_classes:
            raise ConfigError(f"data.source.colours: {len(colours)} colours for {num_classes} classes; give one each.")
        self.colours = None if colours is None else [_code(colour) for colour in colours]
        self.ignores_only_255 = not (shift or map or ignore or colours or ignore_colours)
        """Whether no option says which pixels are not labelled, so that 255 is the only such value."""
        self._colour_table = _colour_table(self.colours or [], [_code(colour) for colour in ignore_colours])
        self._table = _value_table(num_classes, shift, map, ignore)

    def classes(self, values: NDArray[Any], name: str) -> NDArray[np.uint8]:
        """Return the classes (H, W) of a mask's values (H, W), or colours (H, W, 3).

        Args:
            values: result of `read_mask`.
            name: path of the mask, for messages.

        Raises:
            ImageError: a value is in no class and not ignored, or the mask stores colours and there is no colour table.
        """
        if values.ndim == 3:
            return self._classes_of_colours(values, name)
        if self.colours is not None:
            raise ImageError(f"{name}: stores values, not colours; omit data.source.colours.")
        if values.dtype == np.uint8:
            found = self._table.take(values)
        else:
            outside = (values < 0) | (values >= _VALUES)
            found = self._table.take(np.where(outside, 0, values))
            found[outside] = _UNKNOWN
        if found.min() == _UNKNOWN:
            value = values[found == _UNKNOWN][0]
            raise ImageError(
                f"{name}: has the value {value}, which is no class; add it to data.source.ignore, or check"
                " data.source.shift, data.source.map and data.source.classes."
            )
        return found.astype(np.uint8)

    def _classes_of_colours(self, values: NDArray[Any], name: str) -> NDArray[np.uint8]:
        if self.colours is None:
            raise ImageError(
                f"{name}: stores colours, not classes; convert the masks to one value per pixel, or set"
                " data.source.colours to the colour of each class."
            )
        codes = values.astype(np.int64) @ np.array([2**16, 2**8, 1])
        known, classes = self._colour_table
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        wrong = known[places] != codes
        if wrong.any():
            colour = values[wrong][0].tolist()
            raise ImageError(
                f"{name}: has the colour {colour}, which is no class; add it to data.source.ignore_colours."
            )
        return classes[places]


def _value_table(
    num_classes: int, shift: int, mapping: Mapping[int, int] | None, ignore: Sequence[int]
) -> NDArray[np.int16]:
    """Return the class of every value of a 16-bit mask (65536,) int16: `MASK_IGNORE` or -1 for values without one."""
    table = np.full(_VALUES, _UNKNOWN, np.int16)
    if mapping is None:
        shifted = np.arange(_VALUES, dtype=np.int64) + shift
        valid = (shifted >= 0) & (shifted < num_classes)
        table[valid] = shifted[valid]
        if shift == -1:
            table[0] = MASK_IGNORE
        table[MASK_IGNORE] = MASK_IGNORE
    else:
        if wrong := [value for value, number in mapping.items() if number >= num_classes or value >= _VALUES]:
            raise ConfigError(
                f"data.source.map: {wrong[0]} maps to {mapping[wrong[0]]}, but there are {num_classes} classes."
            )
        table[MASK_IGNORE] = MASK_IGNORE
        for value, number in mapping.items():
            table[value] = number
    table[list(ignore)] = MASK_IGNORE
    return table


def _code(colour: Sequence[float]) -> int:
    red, green, blue = (int(part) for part in colour)
    return red << 16 | green << 8 | blue


def _colour_table(colours: list[int], ignored: list[int]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the sorted codes of all known colours, and their classes."""
    codes = np.array([*colours, *ignored], np.int64)
    classes = np.array([*range(len(colours)), *[MASK_IGNORE] * len(ignored)], np.uint8)
    if len(set(codes.tolist())) != len(codes):
        raise ConfigError("data.source.colours: a colour occurs twice; give each class its own.")
    order = np.argsort(codes)
    return codes[order], classes[order]


class MaskCheck(NamedTuple):
    """What the check of an image and its mask found."""

    is_turned: bool
    """Whether the image has an EXIF orientation that turns or mirrors it."""
    occurs: NDArray[np.bool_]
    """(256,) whether a class occurs, or `MASK_IGNORE`."""


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Return the different values of a mask (1, V), or its different colours (1, V, 3); see `read_mask`."""
    if values.ndim == 3:
        codes = np.unique(values.astype(np.int32) @ np.array([2**16, 2**8, 1], np.int32))
        return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)[None]
    if values.dtype == np.uint8:
        return np.flatnonzero(np.bincount(values.ravel())).astype(np.uint8)[None]
    return np.unique(values)[None]


def occurring(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return (256,) whether each class, or `MASK_IGNORE`, occurs in a mask (H, W)."""
    occurs = np.zeros(MASK_IGNORE + 1, bool)
    occurs[mask] = True
    return occurs


def read_mask(path: str | Path) -> NDArray[Any]:
    """Return the values (H, W) that a mask file stores, or the colours (H, W, 3) of one without values.

    Palette files give their indices, never the colours of the palette; 16-bit files keep their values.

    Raises:
        ImageError: the file is missing or damaged, or stores neither values nor colours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in _INDEX_MODES:
                values = np.asarray(image)
                return values.astype(np.int64) if values.dtype != np.uint8 else values
            if image.mode == "RGB":
                return np.asarray(image)
            mode = image.mode
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for damaged files
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
        raise ImageError(f"{path}: not a readable mask ({reason}).") from error
    raise ImageError(f"{path}: is stored as {mode}; save masks with one integer value per pixel.")


def class_colours(count: int) -> NDArray[np.uint8]:
    """Return a distinct colour (count, 3) for each class: PASCAL VOC's, which spreads the bits of the class index."""
    colours = np.zeros((count, 3), np.uint8)
    for number in range(count):
        rest, shift = number + 1, 7  # class 0 is not black, which marks pixels that are not labelled
        while rest:
            for channel in range(3):
                colours[number, channel] |= (rest >> channel & 1) << shift
            rest, shift = rest >> 3, shift - 1
    return colours
