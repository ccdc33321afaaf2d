"""Label maps: an annotator's scores at every position of an image, their storage, and token targets made from them."""

from vitrail.data.label_maps.join import LabelMapJoin
from vitrail.data.label_maps.store import LabelMapStore, LabelMapWriter
from vitrail.data.label_maps.targets import TokenTargets, pooled_scores, sparse_token_targets, token_targets

__all__ = [
    "LabelMapJoin",
    "LabelMapStore",
    "LabelMapWriter",
    "TokenTargets",
    "pooled_scores",
    "sparse_token_targets",
    "token_targets",
]
