"""Build the LightningModule of semantic segmentation, and check that its parts fit together."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from vitrail.checkpoints.fitting import load_checkpoint
from vitrail.checkpoints.reading import find_weights, read_checkpoint
from vitrail.data.segmentation import SegmentationDataModule
from vitrail.errors import ConfigError
from vitrail.models.any_size import allow_any_size
from vitrail.objectives.contract import uses_of
from vitrail.runs.config import instantiate
from vitrail.runs.directory import find_weights_file
from vitrail.training.segmentation import DenseInference, SemanticSegmenter
from vitrail.types import InputSpec, height_width

log = logging.getLogger(__name__)

SEGMENTERS = ("vitrail.models.upernet", "vitrail.models.linear_segmenter")
"""Functions that build segmentation networks."""

INFERENCE_KEYS = ("short_side", "long_side", "eval_mode", "eval_stride", "eval_scales", "eval_flip")
"""Keys of a segmentation data config that say how whole images are predicted."""


def build_inference(data: SegmentationDataModule, model: nn.Module) -> DenseInference:
    """Return how the data's whole images are predicted; see `inference_of`."""
    return inference_of(model, data.input, {key: getattr(data, key) for key in INFERENCE_KEYS})


def inference_of(model: nn.Module, spec: InputSpec, settings: Mapping[str, Any]) -> DenseInference:
    """Return how whole images are predicted; lets the backbone run at any size if images are predicted whole.

    Args:
        model: segmentation network.
        spec: its input in training; its size is the window's.
        settings: `INFERENCE_KEYS`, and others that are not used. Without them images are resized to a shorter side of
            the window's and a longer side of at most four times as much, as in the published recipes.

    Raises:
        ConfigError: whole images are to be predicted by a backbone with a fixed image size.
    """
    patch: Any = getattr(getattr(model, "backbone", None), "patch_embed", None)
    sides = height_width(getattr(patch, "patch_size", None) or 16)
    multiple = 2 * max(sides)  # some pyramids halve the grid of patches
    mode: Any = settings.get("eval_mode") or "slide"
    stride = settings.get("eval_stride")
    if mode == "whole":
        _allow_whole_images(model, spec.size, multiple)
    short_side = settings.get("short_side") or min(spec.size)
    return DenseInference(
        spec.mean,
        spec.std,
        spec.size,
        mode,
        None if stride is None else height_width(stride),
        short_side,
        settings.get("long_side") or 4 * short_side,
        tuple(settings.get("eval_scales") or (1.0,)),
        bool(settings.get("eval_flip")),
        multiple=multiple,
    )


def _allow_whole_images(model: Any, size: tuple[int, int], multiple: int) -> None:
    """Let the backbone run at other sizes than the training's `size`, of which each side is divided by `multiple`.

    Raises:
        ConfigError: it cannot.
    """
    backbone = allow_any_size(model.backbone)
    rows, columns = size[0] + multiple, size[1] + 2 * multiple
    was_training, device = model.training, next(model.parameters()).device
    try:
        with torch.no_grad():  # with real numbers, as indices out of bounds have no error without
            model.eval()(torch.zeros(1, 3, rows, columns, device=device))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"data.eval_mode=whole: {type(backbone).__name__} does not accept images of every size, such as"
            f" {rows} x {columns} pixels; set data.eval_mode=slide."
        ) from error
    finally:
        model.train(was_training)


def build_segmenter(config: DictConfig, data: SegmentationDataModule, model: nn.Module) -> SemanticSegmenter:
    """Build the LightningModule of a training.

    Raises:
        ConfigError: the parts do not fit together.
    """
    objective = instantiate(config.objective, "objective")
    if "masks" not in uses_of(objective):
        name = type(objective).__name__
        raise ConfigError(f"objective: {name} does not use masks; set objective=segmentation.")
    for key in ("mixing", "phases", "teacher"):
        if config.get(key) is not None:
            raise ConfigError(f"{key}: segmentation does not support it; omit it, or set {key}=null.")
    if config.init_from is not None and not config.resume:
        load_initial(model, config.init_from, data.classes)
    return SemanticSegmenter(
        model,
        objective,
        data.num_classes,
        build_inference(data, model),
        optimizer=instantiate(config.optimizer, "optimizer"),
        schedule=instantiate(config.schedule, "schedule"),
        seed=config.seed,
        compile_mode=config.compile,
        grad_checkpointing=config.grad_checkpointing,
    )


def load_initial(model: Any, init_from: str, classes: list[str]) -> list[str]:
    """Load initial weights: of a segmentation network, or of a classifier into the backbone; return what was done.

    The classifier's heads, token logits included, and blocks behind the last feature map are left out. Position tables
    are resized once (bicubic).

    Raises:
        ConfigError: the weights do not fit.
    """
    file, _ = find_weights_file(init_from, "init_from")
    checkpoint = {} if file.suffix == ".npz" else read_checkpoint(file, key="init_from")
    names = model.state_dict().keys()
    found = find_weights(checkpoint, names=names)[0]
    if any(name.startswith("decode_head.") for name in found):
        return load_checkpoint(model, file, key="init_from", classes=classes)
    backbone = model.backbone
    own = backbone.state_dict().keys()
    weights = find_weights(checkpoint, names=own)[0]
    children = {name.partition(".")[0] for name in own}
    extra = sorted({name.partition(".")[0] for name in weights} - children)
    depth = len(getattr(backbone, "blocks", ()))
    unused = [f"blocks.{number}.*" for number in range(depth, depth + 100)] if depth else []
    notes = load_checkpoint(backbone, file, allow=(*(f"{name}.*" for name in extra), *unused), key="init_from")
    if extra:
        notes.append(f"not used by segmentation, dropped: {', '.join(extra)}.")
        log.info("init_from=%s: %s", init_from, notes[-1])
    return notes
