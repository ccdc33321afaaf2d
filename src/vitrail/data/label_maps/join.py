"""Join label maps to the images of a split, by key."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.data.label_maps.checks import (
    Finding,
    check_agreement,
    check_keys_match,
    check_names,
    check_values,
    measure_agreement,
    sample_of,
)
from vitrail.data.label_maps.store import LabelMapStore
from vitrail.errors import ConfigError
from vitrail.types import LabelMap, View, Warp

log = logging.getLogger(__name__)

_SURE = 30.0  # score of the true class in the map of an image that has none: 1 - 1e-10 after a softmax of 1000 classes


class LabelMapJoin:
    """The label map of each image of a split, with the view that augmentation took.

    Args:
        store: the maps.
        keys: of the split's images, in order.
        classes: names of the data's classes.
        on_missing: `error`, or `ignore`: such an image's tokens all learn its label.
        center_square_maps: of maps that cover the central square only, as the published ones do, on images that are not
            square: `placed` where they belong, so that what lies outside has no label; or `stretched` over the whole
            image, as the official code does.

    Raises:
        ConfigError: maps of other classes than the data's, or images without a map.
    """

    def __init__(
        self,
        store: LabelMapStore,
        keys: Sequence[str],
        classes: Sequence[str],
        on_missing: Literal["error", "ignore"] = "error",
        center_square_maps: Literal["placed", "stretched"] = "placed",
    ) -> None:
        if center_square_maps not in ("placed", "stretched"):
            raise ConfigError(f"data.center_square_maps={center_square_maps}: must be placed or stretched.")
        if on_missing not in ("error", "ignore"):
            raise ConfigError(f"data.on_missing_map={on_missing}: must be error or ignore.")
        self.store, self.classes = store, classes
        self.placed = center_square_maps == "placed" and store.about.get("coverage") == "center square"
        self._refuse(check_names(store, classes))
        self.records: NDArray[np.int64] = store.indices(keys)
        missing = int((self.records < 0).sum())
        if missing < len(keys) and missing and on_missing == "ignore":
            log.warning("%d of %d images have no label map; their tokens learn the image's label.", missing, len(keys))
        else:
            self._refuse(check_keys_match(store, keys, self.records))

    def check(self, labels: NDArray[np.int64], sample: int = 256) -> None:
        """Look at the maps of some images before a training learns from them.

        Args:
            labels: (N,) classes of the split's images.
            sample: images to look at.

        Raises:
            ConfigError: what the maps say has nothing to do with the images' classes, or makes no sense.
        """
        images = np.flatnonzero(self.records >= 0)
        images = images[sample_of(len(images), sample)]
        records = self.records[images]
        self._refuse(check_values(self.store, records))
        agreement = measure_agreement(self.store, records, labels[images], self.store.num_classes)
        self._refuse(check_agreement(agreement, self.classes))

    def _refuse(self, finding: Finding) -> None:
        if finding.level == "error":
            raise ConfigError(f"data.label_maps={self.store.path}: {finding.text}; {finding.advice}.")
        if finding.level == "warning":
            log.warning("data.label_maps=%s: %s; %s.", self.store.path, finding.text, finding.advice)

    def __call__(self, index: int, label: int, view: View, size: tuple[int, int]) -> LabelMap:
        """The map of image `index` of the split, which has this `size` (width, height)."""
        record = int(self.records[index])
        if record >= 0:
            scores, classes = self.store[record]
            classes = classes.astype(np.int32, copy=False)
        else:
            scores, classes = self._certain(label)
        if self.placed and record >= 0 and size[0] != size[1]:
            view = view._replace(warps=(_central_square(size), *view.warps))
        if view.warps:
            scores, classes = _warped(scores, classes, view)
        box, flipped = torch.tensor(view.box), torch.tensor(view.flipped)
        return LabelMap(torch.from_numpy(scores), torch.from_numpy(classes), box, flipped)

    def _certain(self, label: int) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
        """A map that says `label` everywhere; its other entries have the score of absent classes."""
        shape = self.store.layout.shape
        scores = np.zeros(shape, np.float16)
        scores[0] = _SURE
        others = [(label + step) % self.store.num_classes for step in range(shape[0])]
        return scores, np.broadcast_to(np.array(others, np.int32)[:, None, None], shape).copy()


def _central_square(size: tuple[int, int]) -> Warp:
    """From places in the whole image to places in its central square."""
    width, height = size
    side = min(size)
    a, e = width / side, height / side
    return Warp((a, 0.0, (1 - a) / 2, 0.0, e, (1 - e) / 2), (0.0, 0.0, 1.0, 1.0))


def _warped(
    scores: NDArray[np.float16], classes: NDArray[np.int32], view: View
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """The map (K, H, W) of the warped image: each cell gets what is said where its centre comes from.

    Nearest cell, and score 0 where there was no picture, as the official code does; but about the right centre, and
    with each axis in its own unit.
    """
    height, width = scores.shape[1:]
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    if view.flipped:  # the map is that of the image before it was mirrored
        x = 1 - x
    inside = np.ones((height, width), bool)
    for (a, b, c, d, e, f), (x1, y1, x2, y2) in reversed(view.warps):
        x, y = a * x + b * y + c, d * x + e * y + f
        inside &= (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
    if view.flipped:
        x = 1 - x
    rows = np.floor(y * height).astype(np.int64).clip(0, height - 1)
    columns = np.floor(x * width).astype(np.int64).clip(0, width - 1)
    return scores[:, rows, columns] * inside, classes[:, rows, columns]
