"""Training: the LightningModule, optimisers, schedules, EMA weights, targets and callbacks."""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.training.adaptive_clip import AdaptiveClip
    from vitrail.training.callbacks import EpochReport, IntervalProgressBar, SpeedMonitor
    from vitrail.training.classifier import ImageClassifier
    from vitrail.training.ema import EMA
    from vitrail.training.fsdp import FSDP
    from vitrail.training.linear_probe import LinearProbe, ProbeSettings
    from vitrail.training.nonfinite_guard import NonfiniteGuard
    from vitrail.training.optimizers import OptimizerFactory
    from vitrail.training.phases import PhaseReport
    from vitrail.training.schedules import CosineSchedule, LinearSchedule
    from vitrail.training.segmentation import SemanticSegmenter
    from vitrail.training.targets import TargetBuilder
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "EMA",
    "FSDP",
    "AdaptiveClip",
    "CosineSchedule",
    "EpochReport",
    "ImageClassifier",
    "IntervalProgressBar",
    "LinearProbe",
    "LinearSchedule",
    "NonfiniteGuard",
    "OptimizerFactory",
    "PhaseReport",
    "ProbeSettings",
    "SemanticSegmenter",
    "SpeedMonitor",
    "TargetBuilder",
]
