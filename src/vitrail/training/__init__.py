"""The LightningModule, optimiser and schedule of the published recipes, weight averaging and callbacks."""

from vitrail.training.callbacks import EpochReport, SpeedMonitor
from vitrail.training.classifier import ImageClassifier
from vitrail.training.ema import EMA
from vitrail.training.fsdp import FSDP
from vitrail.training.numbers import NumberGuard
from vitrail.training.optimizers import OptimizerFactory
from vitrail.training.schedules import CosineSchedule

__all__ = [
    "EMA",
    "FSDP",
    "CosineSchedule",
    "EpochReport",
    "ImageClassifier",
    "NumberGuard",
    "OptimizerFactory",
    "SpeedMonitor",
]
