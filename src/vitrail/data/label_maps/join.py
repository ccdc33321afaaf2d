"""Join label maps to the images of a split, by key."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.data.label_maps.store import LabelMapStore
from vitrail.errors import ConfigError
from vitrail.types import LabelMap, View

log = logging.getLogger(__name__)

_SURE = 30.0  # score of the true class in the map of an image that has none: 1 - 1e-10 after a softmax of 1000 classes


class LabelMapJoin:
    """The label map of each image of a split, with the view that augmentation took.

    Args:
        store: the maps.
        keys: of the split's images, in order.
        num_classes: of the data.
        on_missing: `error`, or `ignore`: such an image's tokens all learn its label.

    Raises:
        ConfigError: maps of other classes than the data's, or images without a map.
    """

    def __init__(
        self,
        store: LabelMapStore,
        keys: Sequence[str],
        num_classes: int,
        on_missing: Literal["error", "ignore"] = "error",
    ) -> None:
        if on_missing not in ("error", "ignore"):
            raise ConfigError(f"data.on_missing_map={on_missing}: must be error or ignore.")
        if store.num_classes != num_classes:
            raise ConfigError(
                f"data.label_maps={store.path}: maps of {store.num_classes} classes, the data has {num_classes}."
            )
        self.store = store
        self.records: NDArray[np.int64] = store.indices(keys)
        missing = np.flatnonzero(self.records < 0)
        if len(missing) == len(keys):
            raise ConfigError(
                f"data.label_maps={store.path}: holds no map of any image; its keys look like {store.key(0)}, the"
                f" images' like {keys[0]}."
            )
        if len(missing) and on_missing == "error":
            raise ConfigError(
                f"data.label_maps={store.path}: {len(missing)} of {len(keys)} images have no map, the first is"
                f" {keys[missing[0]]}; data.on_missing_map=ignore lets their tokens learn the image's label."
            )
        if len(missing):
            log.warning(
                "%d of %d images have no label map; their tokens learn the image's label.", len(missing), len(keys)
            )

    def __call__(self, index: int, label: int, view: View) -> LabelMap:
        """The map of image `index` of the split."""
        record = int(self.records[index])
        if record >= 0:
            scores, classes = self.store[record]
            classes = classes.astype(np.int32, copy=False)
        else:
            scores, classes = self._certain(label)
        box, flipped = torch.tensor(view.box), torch.tensor(view.flipped)
        return LabelMap(torch.from_numpy(scores), torch.from_numpy(classes), box, flipped)

    def _certain(self, label: int) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
        """A map that says `label` everywhere; its other entries have the score of absent classes."""
        shape = self.store.layout.shape
        scores = np.zeros(shape, np.float16)
        scores[0] = _SURE
        others = [(label + step) % self.store.num_classes for step in range(shape[0])]
        return scores, np.broadcast_to(np.array(others, np.int32)[:, None, None], shape).copy()
