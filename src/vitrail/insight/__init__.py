"""What people look at: pictures of batches, tables of results."""

from vitrail.insight.evaluation import Evaluation, evaluation_picture, evaluation_report
from vitrail.insight.label_maps import LabelMapPicture
from vitrail.insight.pictures import FirstBatchPicture
from vitrail.insight.tables import training_report

__all__ = [
    "Evaluation",
    "FirstBatchPicture",
    "LabelMapPicture",
    "evaluation_picture",
    "evaluation_report",
    "training_report",
]
