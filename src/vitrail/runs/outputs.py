"""Check that a backbone returns what it declares, and what its data asks for."""

import torch
from torch import nn

from vitrail.errors import ConfigError
from vitrail.models.heads import declared_outputs, forward_heads, token_grid


def check_outputs(model: nn.Module, num_classes: int, image_size: tuple[int, int]) -> None:
    """Check the outputs of a forward pass of two images of (height, width) pixels.

    Raises:
        ConfigError: an output is missing or has the wrong shape.
    """
    was_training = model.training
    with torch.no_grad():
        outputs = forward_heads(model.eval(), torch.zeros(2, 3, *image_size))
    model.train(was_training)
    expected: dict[str, tuple[int, ...]] = {"cls": (2, num_classes)}
    if "tokens" in declared_outputs(model):
        rows, columns = token_grid(model, image_size)
        expected["tokens"] = (2, rows * columns, num_classes)
    for name, shape in expected.items():
        found = getattr(outputs, name, None)
        described = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if described != shape:
            raise ConfigError(
                f"model: returns {described} as {name} for two images of {image_size[0]} x {image_size[1]} pixels, but"
                f" must return {shape}, because the data has {num_classes} classes."
            )


def predicts_masks(model: nn.Module) -> bool:
    """Return whether a network segments images."""
    return "masks" in declared_outputs(model)


def check_task(model: nn.Module, has_masks: bool) -> None:
    """Check that network and data belong to the same task, classification or segmentation.

    Args:
        model: network.
        has_masks: whether the data has masks.

    Raises:
        ConfigError: one of them has masks and the other has not.
    """
    if predicts_masks(model) == has_masks:
        return
    advice = "experiment=segmentation selects model, objective and augmentation for segmentation"
    if not has_masks:
        raise ConfigError(
            f"data: has no masks, which {type(model).__name__} needs; {advice}, and data=ade20k data with masks."
        )
    raise ConfigError(f"model: {type(model).__name__} is a classifier, but the data has masks; {advice}.")
