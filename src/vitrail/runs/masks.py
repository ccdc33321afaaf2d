"""Predict the masks of any images with a trained segmentation network.

Shapes: C classes, H x W pixels of an image.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from vitrail.data.segmentation.datamodule import as_tensor
from vitrail.errors import ConfigError
from vitrail.runs.images import name_of
from vitrail.runs.prediction import ImageTensors, autocast, device_of, evaluating, worker_count
from vitrail.training.segmentation import DenseInference
from vitrail.types import InputSpec
from vitrail_runtime.checking import NonNegativeInt, PositiveInt, checked

_OF_CLASSIFIERS = ("top_k", "batch_size", "explain")
_NOTHING = np.empty((0, 0), np.uint8)


class PredictedMask(NamedTuple):
    """The predicted class of each pixel of one image."""

    image: str
    """Path of the image, or its position if it was in memory."""
    mask: NDArray[np.uint8]
    """Index of the class of each pixel (H, W), at the size of the upright image."""
    shares: list[float]
    """Share of the pixels of each of the C classes; their sum is 1."""
    problem: str = ""
    """Why the image cannot be read; it then has no mask."""


def check_options(named: Iterable[str]) -> None:
    """Refuse options that only apply to classifiers.

    Args:
        named: options that the user has set.

    Raises:
        ConfigError: one of them does not apply.
    """
    if wrong := sorted(set(named) & set(_OF_CLASSIFIERS)):
        raise ConfigError(f"{wrong[0]}: does not apply to a network that segments images; omit it.")


@checked
def mask_predictions(
    model: nn.Module,
    spec: InputSpec,
    inference: DenseInference,
    num_classes: PositiveInt,
    images: Sequence[Any],
    *,
    num_workers: NonNegativeInt | None = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> Iterator[PredictedMask]:
    """Yield the mask of each image, in order: one image at a time, as their sizes differ.

    Args:
        model: network that maps images (N, 3, height, width) to logits (N, C, height, width).
        spec: its input.
        inference: how whole images are predicted.
        num_classes: number of classes, C.
        images: images as in `vitrail.runs.images.open_image`.
        num_workers: loader workers; None means the CPU cores, at most 8.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` means a GPU if there is one.
        precision: `fp32`, or `bf16` or `fp16` with autocast.

    Raises:
        ConfigError: an option is invalid.
    """
    place = device_of(device)
    loader: DataLoader[Any] = DataLoader(
        ImageTensors(images, spec.value_range, as_tensor),
        batch_size=None,
        num_workers=worker_count(num_workers, len(images)),
        pin_memory=place.type == "cuda",
    )
    with evaluating(model, place):
        for index, image in loader:
            name = name_of(images[index], index)
            if isinstance(image, str):
                yield PredictedMask(name, _NOTHING, [], image)
                continue
            with torch.inference_mode(), autocast(place, precision):
                predicted = inference(model, image.to(place, non_blocking=True)).argmax(0)
            mask = predicted.byte().cpu().numpy()
            counts = np.bincount(mask.ravel(), minlength=num_classes)
            yield PredictedMask(name, mask, (counts / mask.size).tolist())
