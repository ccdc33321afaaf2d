"""What explains a network's predictions, image by image: where it looks, what it calls each place, what it keeps.

Shapes: B images, C classes, N patch tokens, K kept patch tokens, S selections.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.attention_maps import attention_weights, maps_of, rollout
from vitrail.models.gradient_maps import gradient_map
from vitrail.models.heads import declared_outputs, forward_heads, token_grid
from vitrail.types import Outputs

Kind = Literal["attention", "rollout", "gradient", "tokens", "kept"]
KINDS: tuple[str, ...] = get_args(Kind)


class Explanation(NamedTuple):
    """Maps of a batch; what was not asked for is empty or None."""

    heats: dict[str, Tensor]
    """`attention`, `rollout` and `gradient`, each (B, rows, columns): importance of each place."""
    tokens: Tensor | None
    """Probabilities (B, C, rows, columns) of the classes of each patch token; 0 where it was dropped."""
    kept: Tensor | None
    """(B, S, rows, columns): 1 where a patch token is kept, 0 where it is left out, selection by selection."""

    def of(self, index: int) -> "Explanation":
        """Return the maps of one image, as a batch of one."""
        one = slice(index, index + 1)
        tokens, kept = (None if maps is None else maps[one] for maps in (self.tokens, self.kept))
        return Explanation({kind: maps[one] for kind, maps in self.heats.items()}, tokens, kept)


def explain(model: nn.Module, images: Tensor, kinds: Sequence[str], classes: Tensor | None = None) -> Explanation:
    """Return what explains the predictions of a network, which runs in evaluation mode.

    Args:
        model: network of timm or vitrail.
        images: normalised images (B, 3, H, W).
        kinds: `attention` (of the last block's class token), `rollout`, `gradient`, `tokens` (the classes of the patch
            tokens), `kept` (patch tokens).
        classes: class (B,) that `gradient` explains; None for the predicted ones.

    Raises:
        ConfigError: a kind is unknown, or the network cannot give it.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"cannot be drawn; choose from {', '.join(KINDS)}.")
    _check_outputs(model, kinds)
    training = model.training
    model.eval()
    try:
        heats = _heats(model, images, kinds, classes)
        if not {"tokens", "kept"} & set(kinds):
            return Explanation(heats, None, None)
        with torch.no_grad():
            outputs = forward_heads(model, images)
    finally:
        model.train(training)
    grid = token_grid(model, (images.shape[-2], images.shape[-1]))
    decisions = outputs.extras.get("decisions")
    kept = None if decisions is None else decisions.unflatten(2, grid)
    tokens = _token_classes(outputs, kept, grid) if "tokens" in kinds else None
    return Explanation(heats, tokens, kept if "kept" in kinds else None)


def check_kinds(model: nn.Module, kinds: Sequence[str], image_size: tuple[int, int], key: str = "explain") -> None:
    """Check with a blank image that a network can give each kind of explanation.

    Args:
        model: network.
        kinds: as in `explain`.
        image_size: (height, width) in pixels.
        key: config key of `kinds`, for error messages.

    Raises:
        ConfigError: it cannot give one of them.
    """
    blank = torch.zeros(1, 3, *image_size, device=next(model.parameters()).device)
    for kind in kinds:
        try:
            explain(model, blank, [kind])
        except ConfigError as error:
            raise ConfigError(f"{key}={kind}: {error}") from error


def _check_outputs(model: nn.Module, kinds: Sequence[str]) -> None:
    declared = declared_outputs(model)
    if "tokens" in kinds and "tokens" not in declared:
        raise ConfigError(f"{type(model).__name__} does not classify its patch tokens; use model.token_head=true.")
    if "kept" in kinds and "decisions" not in declared:
        raise ConfigError(f"{type(model).__name__} keeps all its tokens; choose a DynamicViT or Evo-ViT.")


def _heats(model: nn.Module, images: Tensor, kinds: Sequence[str], classes: Tensor | None) -> dict[str, Tensor]:
    weights = attention_weights(model, images) if {"attention", "rollout"} & set(kinds) else []
    heats: dict[str, Tensor] = {}
    for kind in kinds:
        if kind == "attention":
            heats[kind] = maps_of(weights[-1], model, images)
        elif kind == "rollout":
            heats[kind] = maps_of(rollout(weights), model, images)
        elif kind == "gradient":
            if classes is None:
                with torch.no_grad():
                    classes = model(images).argmax(1)
            heats[kind] = gradient_map(model, images, classes)
    return heats


def _token_classes(outputs: Outputs, kept: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Return the probabilities (B, C, rows, columns) of token logits (B, N, C), or (B, K, C) of the kept tokens."""
    tokens = outputs.tokens
    assert tokens is not None
    if not tokens.any():
        raise ConfigError(
            "the classifier of patch tokens is zero, as after a linear probe, which trains the classifier of the class"
            " token only."
        )
    probabilities = tokens.float().softmax(-1).mT  # (B, C, K)
    if probabilities.shape[2] == grid[0] * grid[1]:
        return probabilities.unflatten(2, grid)
    assert kept is not None
    places = kept[:, -1:].bool().expand(-1, probabilities.shape[1], -1, -1)  # (B, C, rows, columns)
    return torch.zeros(places.shape, device=tokens.device).masked_scatter(places, probabilities)
