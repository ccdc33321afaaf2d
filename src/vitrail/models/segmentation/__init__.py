"""Networks of semantic segmentation: pyramids, decoders, and the module that joins them to a backbone."""

from vitrail.models.segmentation.segmenter import Segmenter, linear_segmenter, upernet

__all__ = ["Segmenter", "linear_segmenter", "upernet"]
