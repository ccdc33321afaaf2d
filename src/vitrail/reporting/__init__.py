"""Reports for people: pictures of batches, tables of results, figures of evaluations."""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.reporting.confusions import confused_pairs
    from vitrail.reporting.evaluation import Evaluation, evaluation_report
    from vitrail.reporting.evaluation_plots import evaluation_figure
    from vitrail.reporting.label_maps import LabelMapPicture
    from vitrail.reporting.pictures import FirstBatchPicture
    from vitrail.reporting.segmentation import FirstMasksPicture, PredictedMasksPicture
    from vitrail.reporting.tables import training_report
    from vitrail.reporting.validation_pictures import AttentionPicture, PredictionPicture
    from vitrail.reporting.wandb_dashboard import WandbDashboard
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AttentionPicture",
    "Evaluation",
    "FirstBatchPicture",
    "FirstMasksPicture",
    "LabelMapPicture",
    "PredictedMasksPicture",
    "PredictionPicture",
    "WandbDashboard",
    "confused_pairs",
    "evaluation_figure",
    "evaluation_report",
    "training_report",
]
