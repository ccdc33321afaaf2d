"""What people look at: pictures of batches, tables of results."""

from vitrail.insight.label_maps import LabelMapPicture
from vitrail.insight.pictures import FirstBatchPicture
from vitrail.insight.tables import evaluation_table, training_report

__all__ = ["FirstBatchPicture", "LabelMapPicture", "evaluation_table", "training_report"]
