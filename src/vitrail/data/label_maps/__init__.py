"""Label maps: what an annotator sees at every place of an image, stored, and turned into targets of tokens."""

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
