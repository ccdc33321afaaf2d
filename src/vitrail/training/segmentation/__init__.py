"""Training and evaluation of semantic segmentation."""

from vitrail.training.segmentation.inference import DenseInference
from vitrail.training.segmentation.metrics import SegmentationMetrics, SegmentationScores
from vitrail.training.segmentation.module import SemanticSegmenter

__all__ = ["DenseInference", "SegmentationMetrics", "SegmentationScores", "SemanticSegmenter"]
