"""Which places of an image raise a class's logit: gradient times activation, summed over the channels.

At the last feature map of a CNN this is HiResCAM (Draelos and Carin, arXiv:2011.08891). For a ViT the activations are
the tokens that enter the last block, because a class token's logits do not depend on the patch tokens behind it. captum
computes the gradient.

Shapes: B images, P prefix tokens, N patch tokens, T = P + N, D channels, K kept tokens with the prefix.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.features import sequence_grid
from vitrail.models.heads import declared_outputs, forward_heads, token_grid


def gradient_map(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return how much each place raises the logit of a class, (B, rows, columns), at least 0.

    Tokens that the network drops before its last block have 0.

    Args:
        model: network in evaluation mode that gives logits (B, C), of timm or vitrail.
        images: images (B, 3, H, W).
        classes: class (B,) of each image.

    Raises:
        ConfigError: captum is not installed, or the backbone declares no last layer with a place for each token.
    """
    if importlib.util.find_spec("captum") is None:
        raise ConfigError("gradient maps need captum; run pip install 'vitrail[explain]'.")
    from captum.attr import LayerGradientXActivation

    info: Any = getattr(model, "feature_info", None)
    if not isinstance(info, list) or not info or "module" not in info[-1]:
        raise ConfigError(f"{type(model).__name__} declares no feature_info, which names its last layer.")
    if "decisions" in declared_outputs(model) and not hasattr(model, "selection_blocks"):
        raise ConfigError(
            f"{type(model).__name__} selects tokens within its stages, so their positions in the image are unknown."
        )
    with torch.inference_mode(False), torch.enable_grad():
        images, classes = images.clone(), classes.clone()  # validation makes tensors that autograd cannot use
        attribution = LayerGradientXActivation(model, model.get_submodule(info[-1]["module"]))
        has_tokens = hasattr(model, "num_prefix_tokens") and hasattr(model, "blocks")
        product = attribution.attribute(images, classes, attribute_to_layer_input=has_tokens)
    product = product[0] if isinstance(product, tuple) else product
    return _as_maps(model, product.detach().float(), images).clamp_min(0)


def _as_maps(model: nn.Module, product: Tensor, images: Tensor) -> Tensor:
    """Return the sum over channels of (B, D, h, w), (B, h, w, D) or (B, K, D) as maps (B, rows, columns)."""
    if product.ndim == 4:
        channels_last = product.shape[3] == getattr(model, "num_features", 0) != product.shape[1]
        return product.sum(3 if channels_last else 1)
    size = (images.shape[-2], images.shape[-1])
    if not hasattr(model, "selection_blocks"):
        rows, columns, prefix = sequence_grid(model, product.shape[1], size)
        return product.sum(2)[:, prefix:].unflatten(1, (rows, columns))
    with torch.no_grad():
        kept = forward_heads(model, images).extras["decisions"][:, -1].bool()  # (B, N)
    patches = product.sum(2)[:, product.shape[1] - int(kept[0].sum()) :]
    everything = torch.zeros(kept.shape, device=kept.device).masked_scatter(kept, patches)  # (B, N)
    return everything.unflatten(1, token_grid(model, size))
