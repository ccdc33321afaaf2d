"""Semantic segmentation: images with masks, their joint augmentation, and the data module."""

from vitrail.data.segmentation.augment import JointAugmentation
from vitrail.data.segmentation.datamodule import SegmentationDataModule
from vitrail.data.segmentation.folders import SegmentationFolder

__all__ = ["JointAugmentation", "SegmentationDataModule", "SegmentationFolder"]
