"""Predict the classes of any images with a trained network.

Shapes: B images of a batch, C classes, K most likely classes, H x W pixels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitrail.data import Augmentation
from vitrail.errors import ConfigError, ImageError
from vitrail.models import forward_heads
from vitrail.runs.images import name_of, open_image
from vitrail.runs.outputs import predicts_masks
from vitrail.types import InputSpec
from vitrail_runtime.checking import NonNegativeInt, PositiveInt, checked

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Prediction(NamedTuple):
    """The K most likely classes of one image, most likely first."""

    image: str
    """Path of the image, or its position if it was in memory."""
    classes: list[str]
    """Names of the classes."""
    probabilities: list[float]
    """Their probabilities; those of all C classes sum to 1."""
    problem: str = ""
    """Why the image cannot be read; it then has no classes."""
    explanation: Any = None
    """What `explain` of `predictions` returned for the image."""


class ImageTensors(Dataset[tuple[int, Tensor | str]]):
    """Dataset of the index and the transformed image (3, H, W) of each image; the reason if it cannot be read.

    Args:
        images: images as in `vitrail.runs.images.open_image`.
        value_range: black and white of images with more than 8 bits per channel.
        transform: maps Pillow's image to a tensor (3, H, W).
    """

    def __init__(
        self,
        images: Sequence[Any],
        value_range: tuple[float, float] | None,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.images, self.value_range, self.transform = images, value_range, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        image = self.images[index]
        try:
            return index, self.transform(open_image(image, name_of(image, index), self.value_range))
        except ImageError as error:
            return index, str(error)


def require_classifier(model: nn.Module, key: str) -> None:
    """Refuse a network that segments images where classes of whole images are needed.

    Raises:
        ConfigError: the network predicts masks; the message names `key`.
    """
    if predicts_masks(model):
        raise ConfigError(f"{key}: this network segments images; a classifier is needed here.")


@checked
def predictions(
    model: nn.Module,
    spec: InputSpec,
    classes: Sequence[str],
    images: Sequence[Any],
    *,
    top_k: PositiveInt = 5,
    batch_size: PositiveInt = 32,
    num_workers: NonNegativeInt | None = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    explain: Callable[[Tensor, Tensor], Sequence[Any]] | None = None,
) -> Iterator[Prediction]:
    """Yield the prediction for each image, in order.

    Args:
        model: network.
        spec: its input.
        classes: names of its C classes.
        images: images as in `vitrail.runs.images.open_image`.
        top_k: number of classes K; all if there are fewer.
        batch_size: images per step.
        num_workers: loader workers; None means the CPU cores, at most 8.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` means a GPU if there is one.
        precision: `fp32`, or `bf16` or `fp16` with autocast.
        explain: called with the batch (B, 3, H, W) and the most likely classes (B), on the device; returns B
            explanations.

    Raises:
        ConfigError: the network is no classifier, or an option is invalid.
    """
    require_classifier(model, "ckpt")
    place = device_of(device)
    augment = Augmentation(
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,  # type: ignore[arg-type]
        eval_interpolation=spec.interpolation,  # type: ignore[arg-type]
    )
    loader: DataLoader[Any] = DataLoader(
        ImageTensors(images, spec.value_range, augment.evaluation(spec)),
        batch_size=batch_size,
        num_workers=worker_count(num_workers, -(-len(images) // batch_size)),
        pin_memory=place.type == "cuda",
        collate_fn=_separate,
    )
    with evaluating(model, place):
        for items, batch in loader:
            best: Iterator[tuple[list[int], list[float], Any]] = iter(())
            if batch is not None:
                batch = batch.to(place, non_blocking=True)
                with torch.inference_mode(), autocast(place, precision):
                    logits = forward_heads(model, batch).merged()
                top = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
                found = explain(batch, top.indices[:, 0].clone()) if explain else [None] * len(batch)
                best = zip(top.indices.tolist(), top.values.tolist(), found, strict=True)
            for index, problem in items:
                labels, shares, explanation = ([], [], None) if problem else next(best)
                name = name_of(images[index], index)
                yield Prediction(name, [str(classes[label]) for label in labels], shares, problem, explanation)


def worker_count(num_workers: int | None, batches: int) -> int:
    """Return the number of loader workers; None means the CPU cores, at most 8 and at most one per batch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores, batches) if num_workers is None else num_workers


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass in `precision`, one of `DTYPES`."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device, in evaluation mode, and back at the end."""
    before, was_training = next(model.parameters()).device, model.training
    model.to(device).eval()
    try:
        yield
    finally:
        model.to(before).train(was_training)


def _separate(items: list[tuple[int, Tensor | str]]) -> tuple[list[tuple[int, str]], Tensor | None]:
    """Return the index and problem of each item (empty if it can be read), and the batch (B, 3, H, W) of the others."""
    tensors = [item for _, item in items if isinstance(item, Tensor)]
    problems = [(index, item if isinstance(item, str) else "") for index, item in items]
    return problems, torch.stack(tensors) if tensors else None


def device_of(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: no such device; choose auto, cpu, cuda or cuda:<number>.") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={name}: cannot predict here; choose auto, cpu, cuda or cuda:<number>.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ConfigError(f"device={name}: PyTorch sees {seen} GPUs here; use device=cpu.")
    return device
