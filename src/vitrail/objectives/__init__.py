"""Objectives: map outputs and targets to scalar losses, of which `loss` is minimised; depends on torch only."""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.objectives.classification import BinaryCrossEntropy, CrossEntropy
    from vitrail.objectives.contract import Objective
    from vitrail.objectives.cosub import CosubLoss
    from vitrail.objectives.distillation import DistillationLoss
    from vitrail.objectives.dynamic_vit import DynamicViTLoss
    from vitrail.objectives.evo_vit import EvoViTLoss
    from vitrail.objectives.feature_distillation import FeatureDistillation
    from vitrail.objectives.segmentation import SegmentationLoss
    from vitrail.objectives.token_labeling import TokenLabelingLoss
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "BinaryCrossEntropy",
    "CosubLoss",
    "CrossEntropy",
    "DistillationLoss",
    "DynamicViTLoss",
    "EvoViTLoss",
    "FeatureDistillation",
    "Objective",
    "SegmentationLoss",
    "TokenLabelingLoss",
]
