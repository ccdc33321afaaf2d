"""Spatial features of any timm model, and its classifier applied at each position.

Feature maps (B, D, H, W) or (B, H, W, D) and token sequences (B, prefix + N, D) are all read as a grid of N = H * W
positions in row-major order.

Shapes: B images, N positions, D channels, C classes, H x W positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.types import ImageSize, height_width


def classify_places(
    model: nn.Module, features: Tensor, image_size: tuple[int, int], forward_head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[int, int]]:
    """Apply `forward_head` to each position as if the feature map consisted of that position alone.

    Args:
        model: backbone that computed the features.
        features: result of `model.forward_features`: (B, D, H, W), (B, H, W, D) or (B, prefix + N, D).
        image_size: (height, width) of the images in pixels.
        forward_head: maps features of M images to (M, C), such as `model.forward_head`.

    Returns:
        The results (B, N, C), and the grid (rows, columns).

    Raises:
        ConfigError: the features do not form a grid.
    """
    timm_model: Any = model
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise ConfigError(f"model: {type(model).__name__} has no spatial feature map; choose another backbone.")
    if features.ndim == 3:
        rows, columns, prefix = sequence_grid(model, features.shape[1], image_size)
        patches = features[:, prefix:].flatten(0, 1)
        # Repeat the token in the prefix, so that any kind of pooling returns it unchanged.
        scores = forward_head(patches[:, None].expand(-1, prefix + 1, -1))
    else:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC" or (
            features.shape[1] != timm_model.num_features == features.shape[3]
        )
        positions = features if channels_last else features.permute(0, 2, 3, 1)  # (B, H, W, D)
        rows, columns = positions.shape[1:3]
        single = positions.reshape(-1, 1, 1, positions.shape[-1])
        scores = forward_head(single if channels_last else single.permute(0, 3, 1, 2))
    return scores.reshape(len(features), rows * columns, -1), (rows, columns)


def patch_features(model: nn.Module, features: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return the features (B, N, D) of all positions in row-major order, without prefix tokens, and their grid.

    Args:
        model: backbone that computed the features.
        features: result of `model.forward_features`: (B, D, H, W), (B, H, W, D) or (B, prefix + N, D).
        image_size: (height, width) of the images in pixels.

    Raises:
        ConfigError: the features do not form a grid.
    """
    return classify_places(model, features, image_size, _last_token)


def _last_token(position: Tensor) -> Tensor:
    """Return the features (M, D) of positions given as (M, prefix + 1, D), (M, 1, 1, D) or (M, D, 1, 1)."""
    return position[:, -1] if position.ndim == 3 else position.flatten(1)


def feature_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the features of images of (height, width) pixels, without computing them."""
    shape = feature_shape(model, image_size)
    if len(shape) == 3:
        rows, columns, _ = sequence_grid(model, shape[1], image_size)
        return rows, columns
    channels_first = shape[1] == model.num_features and getattr(model, "output_fmt", "NCHW") != "NHWC"
    return (shape[2], shape[3]) if channels_first else (shape[1], shape[2])


def sequence_grid(model: nn.Module, tokens: int, image_size: tuple[int, int]) -> tuple[int, int, int]:
    """Return rows and columns of the patch tokens in a sequence, and the number of tokens before them.

    Raises:
        ConfigError: the sequence does not form a grid of patches.
    """
    patch_embed: Any = getattr(model, "patch_embed", None)
    if hasattr(patch_embed, "dynamic_feat_size"):
        rows, columns = patch_embed.dynamic_feat_size(image_size)
        prefix = tokens - rows * columns
        if 0 <= prefix == getattr(model, "num_prefix_tokens", prefix):
            return rows, columns, prefix
    else:  # no declared grid: find the one with the aspect ratio of the image
        height, width = image_size
        declared = getattr(model, "num_prefix_tokens", None)
        for prefix in (0, 1, 2) if declared is None else (declared,):
            rows = round(((tokens - prefix) * height / width) ** 0.5)
            if rows and (tokens - prefix) % rows == 0 and rows * width == (tokens - prefix) // rows * height:
                return rows, (tokens - prefix) // rows, prefix
    raise ConfigError(f"model: {type(model).__name__} returns {tokens} tokens, which do not form a grid of patches.")


def feature_shape(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of `model.forward_features` for one image of (height, width) pixels, without computing it."""
    timm_model: Any = model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _on_meta(model):
            features = timm_model.forward_features(torch.empty(1, 3, *image_size, device="meta"))
    finally:
        model.train(was_training)
    return tuple(features.shape)


def intermediate_shapes(
    model: nn.Module, indices: Sequence[int], image_size: ImageSize, norm: bool = False
) -> list[tuple[int, ...]]:
    """Return the shapes (1, D, H, W) of feature maps of one image, if possible without computing them.

    Args:
        model: backbone with timm's `forward_intermediates`.
        indices: indices of the maps.
        image_size: side of the image in pixels, or (height, width).
        norm: apply the last norm to every map.

    Raises:
        ConfigError: the backbone has no such maps.
    """

    def found() -> list[Tensor]:
        try:
            with _on_meta(model):
                return _maps(model, indices, image_size, norm, "meta")
        except Exception:  # some shapes depend on values, as in Gemma 4's vision encoder
            return _maps(model, indices, image_size, norm, next(model.parameters()).device)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [tuple(features.shape) for features in found()]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each backbone has its own checks
        rows, columns = height_width(image_size)
        raise ConfigError(
            f"model.name: {type(model).__name__} gives no feature maps for images of {rows} x {columns} pixels"
            f" ({str(error).rstrip('.') or type(error).__name__}); choose another backbone or size"
            f"{', or set model.norm=false' if norm else ''}."
        ) from error
    finally:
        model.train(was_training)


def unused_tokens(
    model: nn.Module, indices: Sequence[int], image_size: ImageSize, norm: bool = False
) -> list[nn.Parameter]:
    """Return the model's own parameters, those of no layer (tokens, tables), that the feature maps do not depend on.

    Args:
        model, indices, image_size, norm: as for `intermediate_shapes`; a model whose shapes depend on values has none.
    """
    own = {name: parameter for name, parameter in model._parameters.items() if parameter is not None}
    try:
        with _on_meta(model), torch.enable_grad():
            tensors: list[Any] = [model._parameters[name].requires_grad_() for name in own]  # type: ignore[union-attr]
            total = sum(features.sum() for features in _maps(model, indices, image_size, norm, "meta"))
            grads = torch.autograd.grad(total, tensors, allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError:
        return []
    return [parameter for parameter, grad in zip(own.values(), grads, strict=True) if grad is None]


def _maps(
    model: Any, indices: Sequence[int], image_size: ImageSize, norm: bool, device: torch.device | str
) -> list[Tensor]:
    return model.forward_intermediates(
        torch.zeros(1, 3, *height_width(image_size), device=device),
        indices=list(indices),
        norm=norm,
        output_fmt="NCHW",
        intermediates_only=True,
    )


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Give a model tensors without values.

    Unlike `torch.func.functional_call`, this restores modules that appear under several names.
    """
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    own = [dict(table) for table in tables]
    for table in tables:
        for name, tensor in table.items():
            table[name] = tensor if tensor is None else torch.empty_like(tensor, device="meta")
    try:
        yield
    finally:
        for table, tensors in zip(tables, own, strict=True):
            table.update(tensors)
