"""Join label maps to the images of a split, by key.

Shapes: N images of the split, K scores per cell, H x W cells.
"""

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
)
from vitrail.data.label_maps.store import LabelMapStore
from vitrail.data.sampling import sample_of
from vitrail.errors import ConfigError
from vitrail.types import Geometry, LabelMap, Warp
from vitrail_runtime.checking import checked

log = logging.getLogger(__name__)

# Score of the label in the map that replaces a missing one: probability 1 - 1e-10 after a softmax over 1000 classes.
_CERTAIN_SCORE = 30.0


@checked
class LabelMapJoin:
    """Lookup that returns the label map of each image of a split, cropped and turned like its view.

    Args:
        store: the label maps.
        keys: keys of the split's images, in order.
        classes: names of the data's classes.
        on_missing: `error`, or `ignore`: all tokens of an image without a label map learn the image's label.
        center_square_maps: for maps that cover only the central square, as the published ones do, and images that are
            not square: `placed` at the central square, so that the area outside has no label; or `stretched` over the
            whole image, as in the official code.

    Raises:
        ConfigError: the label maps have other classes than the data, or images have no label map.
    """

    def __init__(
        self,
        store: LabelMapStore,
        keys: Sequence[str],
        classes: Sequence[str],
        on_missing: Literal["error", "ignore"] = "error",
        center_square_maps: Literal["placed", "stretched"] = "placed",
    ) -> None:
        self.store, self.classes = store, classes
        self.placed = center_square_maps == "placed" and store.about.get("coverage") == "center square"
        self._report(check_names(store, classes))
        self.records: NDArray[np.int64] = store.indices(keys)
        missing = int((self.records < 0).sum())
        if missing < len(keys) and missing and on_missing == "ignore":
            log.warning("%d of %d images have no label map; their tokens use the image's label.", missing, len(keys))
        else:
            self._report(check_keys_match(store, keys, self.records))

    def check(self, labels: NDArray[np.int64], sample: int = 256) -> None:
        """Check a sample of the label maps before training.

        Args:
            labels: (N,) classes of the split's images.
            sample: number of images to check.

        Raises:
            ConfigError: the label maps do not agree with the images' classes, or contain invalid values.
        """
        images = np.flatnonzero(self.records >= 0)
        images = images[sample_of(len(images), sample)]
        records = self.records[images]
        self._report(check_values(self.store, records))
        agreement = measure_agreement(self.store, records, labels[images], self.store.num_classes)
        self._report(check_agreement(agreement, self.classes))

    def _report(self, finding: Finding) -> None:
        if finding.level == "error":
            raise ConfigError(f"data.label_maps={self.store.path}: {finding.text}; {finding.advice}.")
        if finding.level == "warning":
            log.warning("data.label_maps=%s: %s; %s.", self.store.path, finding.text, finding.advice)

    def __call__(self, index: int, label: int, geometry: Geometry, size: tuple[int, int]) -> LabelMap:
        """Return the label map (K, H, W) of image `index`, of this `size` (width, height) in pixels."""
        record = int(self.records[index])
        if record >= 0:
            scores, classes = self.store[record]
            classes = classes.astype(np.int32, copy=False)
        else:
            scores, classes = self._certain(label)
        if self.placed and record >= 0 and size[0] != size[1]:
            geometry = geometry._replace(warps=(_central_square(size), *geometry.warps))
        if geometry.warps:
            scores, classes = _warped(scores, classes, geometry)
        box, flipped = torch.tensor(geometry.box), torch.tensor(geometry.flipped)
        return LabelMap(torch.from_numpy(scores), torch.from_numpy(classes), box, flipped)

    def _certain(self, label: int) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
        """Return a map (K, H, W) with `label` in every cell; the other entries have score 0, as absent classes do."""
        shape = self.store.layout.shape
        scores = np.zeros(shape, np.float16)
        scores[0] = _CERTAIN_SCORE
        others = [(label + step) % self.store.num_classes for step in range(shape[0])]
        return scores, np.broadcast_to(np.array(others, np.int32)[:, None, None], shape).copy()


def _central_square(size: tuple[int, int]) -> Warp:
    """Return the warp that maps coordinates in the whole image to coordinates in its central square."""
    width, height = size
    side = min(size)
    a, e = width / side, height / side
    return Warp((a, 0.0, (1 - a) / 2, 0.0, e, (1 - e) / 2), (0.0, 0.0, 1.0, 1.0))


def _warped(
    scores: NDArray[np.float16], classes: NDArray[np.int32], geometry: Geometry
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Return the map (K, H, W) of the warped image: each cell is copied from where its centre comes from.

    As in the official code, the nearest cell is used, and the score is 0 outside the image. Unlike there, warps are
    about the correct centre, and each axis has its own unit.
    """
    height, width = scores.shape[1:]
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    if geometry.flipped:  # the map belongs to the image before mirroring
        x = 1 - x
    inside = np.ones((height, width), bool)
    for (a, b, c, d, e, f), (x1, y1, x2, y2) in reversed(geometry.warps):
        x, y = a * x + b * y + c, d * x + e * y + f
        inside &= (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
    if geometry.flipped:
        x = 1 - x
    rows = np.floor(y * height).astype(np.int64).clip(0, height - 1)
    columns = np.floor(x * width).astype(np.int64).clip(0, width - 1)
    return scores[:, rows, columns] * inside, classes[:, rows, columns]
