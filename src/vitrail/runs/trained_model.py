"""A trained network with everything that is needed to use it.

Shapes: C classes, H x W pixels, N images.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vitrail.errors import ImageError
from vitrail.runs.assembly import model_name
from vitrail.runs.images import listed_images
from vitrail.runs.masks import PredictedMask, check_options, mask_predictions
from vitrail.runs.outputs import predicts_masks
from vitrail.runs.prediction import Prediction, predictions
from vitrail.runs.segmentation import INFERENCE_KEYS, inference_of
from vitrail.training.segmentation import DenseInference
from vitrail.types import InputSpec

Result = TypeVar("Result", Prediction, PredictedMask)


@dataclass(frozen=True)
class TrainedModel:
    """A trained network, and what is needed to use it.

    Attributes:
        model: network in evaluation mode, on the CPU, with `weights` loaded.
        input: the network's input.
        classes: class names in the order of the logits; None if they were not recorded.
        config: config of the run that trained the network; for other networks it has `model`, and `inference` if the
            export of a segmentation network records how whole images are predicted.
        weights: which weights are loaded: `raw` or `ema`.
        weight_sets: which weights the file contains.
        path: file of the weights; None for weights that timm downloaded.
        licence: licence of the published weights from which the network was trained; None if it started from none.
        classes_recorded: whether `classes` come with the weights; ImageNet's are assumed for others by their number.
    """

    model: nn.Module
    input: InputSpec
    classes: list[str] | None
    config: dict[str, Any]
    weights: str
    weight_sets: tuple[str, ...]
    path: Path | None = field(default=None)
    classes_recorded: bool = True
    licence: str | None = None

    @property
    def name(self) -> str:
        """The network's name in timm, or the name of its class."""
        return model_name(self.config["model"])

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.classes) if self.classes is not None else int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the logits; numbers if they were not recorded."""
        return self.classes or [str(number) for number in range(self.num_classes)]

    @property
    def is_run(self) -> bool:
        """Whether the network comes from a run of vitrail."""
        return "data" in self.config

    @property
    def inference_settings(self) -> dict[str, Any]:
        """Recorded `INFERENCE_KEYS` of a segmentation network; empty if none are recorded."""
        recorded = self.config.get("data") or self.config.get("inference") or {}
        return {key: recorded[key] for key in INFERENCE_KEYS if key in recorded}

    @property
    def inference(self) -> DenseInference:
        """How a segmentation network predicts whole images: as in its training's validation, if that is recorded."""
        return inference_of(self.model, self.input, self.inference_settings)

    def predict(self, images: Any, **options: Any) -> list[Prediction] | list[PredictedMask]:
        """Return the most likely classes of each image, or its mask if the network segments images, in order.

        Args:
            images: one image or several: paths (also folders and patterns, see `find_images`), Pillow's images, arrays
                (H, W, 3) or (N, H, W, 3), tensors (3, H, W) or (N, 3, H, W); uint8, or floats in [0, 1].
            options: `num_workers`, `device`, `precision`, and for a classifier `top_k` and `batch_size`: see
                `vitrail.runs.prediction.predictions` and `vitrail.runs.masks.mask_predictions`.

        Raises:
            ConfigError: a path refers to no image, or an option is invalid.
            ImageError: an image cannot be read.
        """
        listed = listed_images(images)
        if predicts_masks(self.model):
            check_options(options)
            masks = mask_predictions(self.model, self.input, self.inference, self.num_classes, listed, **options)
            return [_readable(mask) for mask in masks]
        return [_readable(item) for item in predictions(self.model, self.input, self.class_names, listed, **options)]


def _readable(result: Result) -> Result:
    """Return the result of an image that could be read.

    Raises:
        ImageError: it could not.
    """
    if result.problem:
        raise ImageError(result.problem)
    return result
