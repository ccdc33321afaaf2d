"""Show the backbones of conf/model: what they cost, what was published, which weights there are."""

from typing import Any

import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from timm import get_pretrained_cfg
from torch import nn

from vitrail.errors import ConfigError
from vitrail.insight.backbones import BackboneRow, backbone_table, layer_tree, published, released_weights, weights_line
from vitrail.models.cost import measure_cost
from vitrail.run.config import check_keys, instantiate


def show(config: DictConfig) -> None:
    """Print the table of all backbones, or `config.model` with its layers.

    Raises:
        ConfigError: a key that nothing reads, or an image size that does not fit the backbone.
    """
    check_keys(config, compose("models"))
    console = get_console()
    if config.model is not None:
        row, model = measure(config.model, config.image_size, config.num_classes)
        console.print(backbone_table([row]), weights_line(row), layer_tree(model, config.depth))
        return
    options = GlobalHydra.instance().config_loader().get_group_options("model")
    rows = []
    for option in options:
        node = compose("models", overrides=[f"model={option}"]).model
        if not OmegaConf.is_missing(node, "name"):  # model=timm names none
            rows.append(measure(node, config.image_size, config.num_classes, option)[0])
    console.print(backbone_table(sorted(rows, key=lambda row: (row.family, row.cost.parameters))))


def measure(
    node: DictConfig, image_size: Any, num_classes: int, option: str | None = None
) -> tuple[BackboneRow, nn.Module]:
    """Build the backbone of a config without memory and count what it costs.

    Raises:
        ConfigError: the image size does not fit the backbone.
    """
    default = get_pretrained_cfg(node.name)
    size = image_size or (default.input_size[1:] if default else (224, 224))
    sides = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    with torch.device("meta"):
        model = instantiate(node, "model", num_classes=num_classes, img_size=sides, pretrained=False)
    try:
        cost = measure_cost(model, (sides[0], sides[1]))
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"image_size={image_size}: {node.name} does not take it ({error}).") from error
    row = BackboneRow(option or node.name, node.name, sides, cost, published(node.name), released_weights(node.name))
    return row, model
