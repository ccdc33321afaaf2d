"""Send pictures to the device: only what their views need."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrail.data.images import size_of
from vitrail.data.render.pil import PILRenderer
from vitrail.types import Picture, Step, View

_MAX_PIXELS = 1 << 20  # larger crops are rendered in the loader, which saves memory on the device


class Shipped(NamedTuple):
    """Picture of one image on its way to the device: the part that its view needs."""

    pixels: NDArray[np.uint8]
    """(H, W, 3)."""
    view: View


def ship(picture: Picture, view: View, renderer: PILRenderer) -> Shipped:
    """Return what the device needs of a picture: its crop, or the whole picture if operations come before the crop.

    A large picture is rendered here, up to normalisation and erasing.
    """
    first = view.steps[0]
    box = (0, 0, *size_of(picture)) if first.name != "crop" else first.values[:4]
    if box[2] * box[3] > _MAX_PIXELS:
        return _rendered_here(picture, view, renderer)
    if first.name == "crop":
        view = view._replace(steps=(Step("crop", (0, 0, *box[2:], first.values[4])), *view.steps[1:]))
    elif first.name == "shift":
        view = _shift_as_crop(view, box[2:], first)
    return Shipped(_array(picture, box), view)


def _rendered_here(picture: Picture, view: View, renderer: PILRenderer) -> Shipped:
    """Return a picture after its steps, with only the identity left to do."""
    rendered = np.asarray(renderer.image(picture, view._replace(output=view.crop_size)))
    return Shipped(rendered, view._replace(steps=(Step("crop", (0, 0, *view.crop_size, "bicubic")),)))


def _shift_as_crop(view: View, size: tuple[int, int], step: Step) -> View:
    """Replace a shift by a resize of the whole picture and a translation into black."""
    top, left, kernel = step.values
    return view._replace(steps=(Step("crop", (0, 0, *size, kernel)), Step("move", (top, left)), *view.steps[1:]))


def _array(picture: Picture, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    top, left, height, width = box
    if isinstance(picture, np.ndarray):
        return picture[top : top + height, left : left + width]
    return np.asarray(picture.crop((left, top, left + width, top + height)))
