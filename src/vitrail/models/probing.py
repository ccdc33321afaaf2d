"""Linear probing: the pooled features of a backbone, and linear classifiers of them written back into the backbone.

Shapes: B images, D features, C classes, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the input (B, D) of the classifier for images (B, 3, H, W), as the backbone itself pools it.

    For a backbone with a distillation token it is the mean of both tokens.
    """
    timm_model: Any = model
    return timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)


def write_classifier(model: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Make `model(images)` the logits of a linear classifier of its pooled features, in place.

    Classifiers of other features (patch tokens, second-order pooling) are set to zero, so that they add nothing.

    Args:
        model: any backbone that passes `check_probe`.
        weight: (C, D).
        bias: (C,).
    """
    first, *others = _classifiers(model)
    used = (first, getattr(model, "head_dist", None))
    with torch.no_grad():
        for classifier in (first, *others):
            is_used = any(classifier is own for own in used)
            classifier.weight.copy_(weight if is_used else torch.zeros_like(classifier.weight))
            classifier.bias.copy_(bias if is_used else torch.zeros_like(classifier.bias))


@torch.no_grad()
def check_probe(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Check that the class logits of `model` are a linear function of its pooled features, by a forward pass.

    All classifiers of `model` are overwritten.

    Args:
        model: backbone in evaluation mode.
        image_size: (height, width) of its images in pixels.

    Raises:
        ConfigError: they are not; a linear probe of this backbone would not be what it predicts.
    """
    name = type(model).__name__
    if not all(hasattr(model, method) for method in ("forward_features", "forward_head", "get_classifier")):
        raise ConfigError(f"probe: {name} does not have timm's methods forward_features and forward_head.")
    if not all(isinstance(classifier, nn.Linear) and classifier.bias is not None for classifier in _classifiers(model)):
        raise ConfigError(
            f"probe: the classifier of {name} is not a linear layer with a bias; choose another backbone."
        )
    generator = torch.Generator().manual_seed(0)
    features = pooled_features(model, images := torch.randn(2, 3, *image_size, generator=generator))
    weight = torch.randn(class_classifier(model).weight.shape, generator=generator)
    bias = torch.randn(len(weight), generator=generator)
    fits = features.ndim == 2 and features.shape[1] == weight.shape[1]
    if fits:
        write_classifier(model, weight, bias)
        expected = nn.functional.linear(features, weight, bias)
        fits = torch.allclose(model(images), expected, atol=1e-4 * float(expected.std()))
    if not fits:
        raise ConfigError(f"probe: the logits of {name} are not a linear function of its pooled features.")


def class_classifier(model: nn.Module) -> Any:
    """Return the classifier of the class token, or of pooled tokens."""
    return _classifiers(model)[0]


def _classifiers(model: Any) -> tuple[Any, ...]:
    """Return all classifiers of `model`, that of the class token (or of pooled tokens) first."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)
