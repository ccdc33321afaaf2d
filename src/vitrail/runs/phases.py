"""Phases of image size: build them from a config, and check that a backbone can run at their sizes."""

from typing import Any

from omegaconf import DictConfig
from torch import nn

from vitrail.data.phases import PhaseCalendar, Phases
from vitrail.errors import ConfigError
from vitrail.models.any_size import allow_any_size
from vitrail.models.tokens_to_token import TokensToToken
from vitrail.runs.config import instantiate
from vitrail.runs.outputs import check_outputs
from vitrail.types import height_width


def build_phases(config: DictConfig, image_size: tuple[int, int]) -> Phases | None:
    """Build the phases of a training that ends at (height, width) pixels; None if the config has none.

    Raises:
        ConfigError: a phase is invalid.
    """
    calendar: PhaseCalendar | None = instantiate(config.get("phases"), "phases")
    return None if calendar is None else calendar.fit(image_size, int(config.trainer.max_epochs))


def fit_to_phases(model: nn.Module, phases: Phases, num_classes: int) -> None:
    """Let `model` run at the sizes of all phases, in place, and check by forward passes that it does.

    Raises:
        ConfigError: the backbone cannot run at one of the sizes.
    """
    name, patch_embed = type(model).__name__, getattr(model, "patch_embed", None)
    allow_any_size(model)
    for size in phases.sizes:
        sides, patch = f"{size[0]} x {size[1]} pixels", _patch_size(patch_embed)
        if any(side % length for side, length in zip(size, patch, strict=True)):
            raise ConfigError(
                f"phases.calendar: {sides} cannot be divided into patches of {name}; set phases.multiple={max(patch)},"
                " its patch size."
            )
        try:
            check_outputs(model, num_classes, size)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"phases: {name} cannot run at {sides} ({reason}); choose another backbone, or set phases=none."
            ) from error


def _patch_size(patch_embed: Any) -> tuple[int, int]:
    """Return the (height, width) in pixels that image sides must be multiples of."""
    patch = getattr(patch_embed, "patch_size", None)
    return (1, 1) if patch is None or isinstance(patch_embed, TokensToToken) else height_width(patch)
