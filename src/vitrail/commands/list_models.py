"""List the backbones with their cost, published accuracy and released weights."""

from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch import nn

from vitrail.errors import ConfigError
from vitrail.models.cost import Cost, measure_cost
from vitrail.reporting.backbones import (
    BackboneRow,
    backbone_table,
    layer_tree,
    licences,
    published,
    published_names,
    released_weights,
    weights_line,
)
from vitrail.runs.assembly import build_model, model_name
from vitrail.runs.keys import check_keys
from vitrail.types import height_width


def show(config: DictConfig) -> None:
    """Print the table of all backbones, or `config.model` with its layers.

    Raises:
        ConfigError: a key is unknown, or the image size does not fit the backbone.
    """
    check_keys(config, "list_models")
    console = get_console()
    if config.model is not None:
        row, model = measure(config.model, config.image_size, config.num_classes)
        console.print(backbone_table([row]), weights_line(row), layer_tree(model, config.depth))
        return
    rows = [measure(_plain(name), config.image_size, config.num_classes)[0] for name in known_backbones()]
    console.print(backbone_table(sorted(rows, key=lambda row: (row.family, row.cost.parameters))))


def known_backbones() -> list[str]:
    """Return the names of vitrail's backbones, and of timm's with an entry in the table of published accuracies."""
    own = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vitrail.")}
    return sorted(own | set(published_names()))


def measure(node: DictConfig, image_size: Any, num_classes: int) -> tuple[BackboneRow, nn.Module]:
    """Build the backbone of a config on the meta device and measure its cost.

    The row has the published accuracies only if the config's arguments leave parameters and MACs as published.

    Raises:
        ConfigError: the image size does not fit the backbone.
    """
    name = model_name(node)
    default = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    sides = height_width(image_size or (default.input_size[1:] if default else (224, 224)))
    model, cost = _build(node, num_classes, sides)
    base, _, tag = name.partition(".") if timm.is_model(name) else (name, "", "")
    tags = [tag] if tag else released_weights(base)
    accuracies = published(base)
    if accuracies and set(node) > {"_target_", "name"} and _build(_plain(name), num_classes, sides)[1] != cost:
        accuracies = []
    return BackboneRow(base, sides, cost, accuracies, tags, licences(base, tags)), model


def _plain(name: str) -> DictConfig:
    """Return the config of timm's backbone `name` without further arguments."""
    return OmegaConf.create({"_target_": "vitrail.models.create_model", "name": name})


def _build(node: DictConfig, num_classes: int, sides: tuple[int, int]) -> tuple[nn.Module, Cost]:
    """Build a backbone without weights, and measure its cost at (height, width) pixels; see `measure` for errors."""
    with torch.device("meta"):
        model = build_model({**node, "pretrained": False}, num_classes, sides)
    try:
        return model, measure_cost(model, sides)
    except (AssertionError, RuntimeError) as error:
        shown = sides[0] if sides[0] == sides[1] else list(sides)
        raise ConfigError(f"image_size={shown}: {model_name(node)} does not support this size ({error}).") from error
