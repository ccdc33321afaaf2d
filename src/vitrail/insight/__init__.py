"""What people look at: pictures of batches, tables of results."""

from vitrail.insight.pictures import FirstBatchPicture
from vitrail.insight.tables import evaluation_table, training_report

__all__ = ["FirstBatchPicture", "evaluation_table", "training_report"]
