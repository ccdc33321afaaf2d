"""Phases of a training: image size and RandAugment magnitude by epoch.

EfficientTrain (Wang et al., arXiv:2211.09703) and EfficientTrain++ (arXiv:2405.08768) train on small, weakly augmented
images first. A phase begins with an epoch, so that it is a function of the epoch alone: loader workers need no message,
and a resumed training is in the right phase.

Shapes: H x W pixels.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from vitrail.data.augment import Augmentation
from vitrail.data.views import TrainingViews
from vitrail.errors import ConfigError
from vitrail.types import InputSpec, View
from vitrail_runtime.checking import NonNegativeInt, Positive, PositiveInt, check_value, checked

log = logging.getLogger(__name__)

_KEYS: dict[str, Any] = {"share": Positive, "image_size": PositiveInt, "magnitude": NonNegativeInt | None}


@dataclass(frozen=True)
class Phase:
    """Epochs `start` to `end` - 1 of a training.

    Attributes:
        start: first epoch, counted from 0.
        end: first epoch after the phase.
        size: (height, width) of the training images in pixels.
        magnitude: magnitude of RandAugment; None for the augmentation's own.
    """

    start: int
    end: int
    size: tuple[int, int]
    magnitude: int | None

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return self.end - self.start


@dataclass(frozen=True)
class Phases:
    """Phases of one training, without those that are shorter than half an epoch.

    Attributes:
        phases: at least one phase, in order, without gaps; the last one has the final image size.
        by: what the shares of the calendar were of: `epochs` or `compute`.
        downscale: how training images get their size; see `PhaseCalendar`.
    """

    phases: tuple[Phase, ...]
    by: str = "epochs"
    downscale: str = "lanczos"

    @property
    def epochs(self) -> int:
        """Number of epochs of the training."""
        return self.phases[-1].end

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Different image sizes, (height, width) in pixels, in order of appearance."""
        return list(dict.fromkeys(phase.size for phase in self.phases))

    def at(self, epoch: int) -> Phase:
        """Return the phase of an epoch; the last one for all later epochs."""
        return next((phase for phase in self.phases if epoch < phase.end), self.phases[-1])

    def compute(self, epochs: float) -> float:
        """Return the compute of the first `epochs` epochs, counted in pixels, in epochs at the final size."""
        final = math.prod(self.phases[-1].size)
        return sum(
            min(max(epochs - phase.start, 0), phase.epochs) * math.prod(phase.size) / final for phase in self.phases
        )

    def schedule_epochs(self, epochs: float) -> float:
        """Return the position in the learning rate schedule after `epochs` epochs, in epochs.

        It is `epochs` itself if the phases share the epochs. If they share the compute, the schedule follows the
        compute, as in EfficientTrain++; it still ends with the last epoch.
        """
        return epochs if self.by == "epochs" else self.compute(epochs) * self.epochs / self.compute(self.epochs)


@checked
class PhaseCalendar:
    """Calendar of phases, for any number of epochs and any final image size.

    Args:
        calendar: phases in order. Each has `share` (of the epochs or of the compute; all together 1), `image_size`
            (side in pixels, relative to that of the last phase), and `magnitude` of RandAugment, or null for that of
            the augmentation.
        by: what the shares are of: `epochs`, or `compute`, counted in pixels: small images then get more epochs.
        multiple: sizes are rounded to a multiple of this number of pixels, the patch size of most ViTs; the last phase
            always has the final size.
        downscale: how a training image gets the phase's size. `lanczos` resizes the finished crop, after RandAugment
            and before random erasing, as the code of EfficientTrain++ does. `crop` renders the random crop at the
            phase's size, which is less work for the loader.

    Raises:
        ConfigError: a phase is invalid.
    """

    def __init__(
        self,
        calendar: Sequence[Mapping[str, float | None]],
        by: Literal["epochs", "compute"] = "epochs",
        multiple: PositiveInt = 16,
        downscale: Literal["lanczos", "crop"] = "lanczos",
    ) -> None:
        self.calendar = [dict(phase) for phase in calendar]
        self.by, self.multiple, self.downscale = by, multiple, downscale
        if not self.calendar:
            raise ConfigError("phases.calendar: has no phases; list at least one, or set phases=none.")
        for number, phase in enumerate(self.calendar):
            if unknown := sorted(phase.keys() - _KEYS.keys()):
                raise ConfigError(f"phases.calendar[{number}].{unknown[0]}: no such key; use {', '.join(_KEYS)}.")
            for key, kind in _KEYS.items():
                check_value(f"calendar[{number}].{key}", phase.get(key), kind)
        total = sum(self._values("share"))
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ConfigError(f"phases.calendar: the shares add up to {total:g}; they must add up to 1.")

    def _values(self, key: str) -> list[Any]:
        return [phase.get(key) for phase in self.calendar]

    def fit(self, final_size: tuple[int, int], epochs: int) -> Phases:
        """Return the phases of a training of `epochs` epochs whose network is evaluated at (height, width) pixels.

        Borders between phases are rounded to whole epochs; the last epoch always has the final size.
        """
        sizes = [self._size(side, final_size) for side in self._values("image_size")]
        shares = [
            share if self.by == "epochs" else share / math.prod(size)
            for share, size in zip(self._values("share"), sizes, strict=True)
        ]
        ends = [min(round(epochs * part / sum(shares)), epochs - 1) for part in accumulate(shares)]
        starts = [0, *ends[:-1]]
        ends[-1] = epochs
        parts = zip(starts, ends, sizes, self._values("magnitude"), strict=True)
        return Phases(tuple(Phase(*part) for part in parts if part[0] < part[1]), self.by, self.downscale)

    def _size(self, side: int, final: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of a phase whose calendar says `side`."""
        last = self.calendar[-1]["image_size"]
        if side == last:
            return final
        steps = (length * side / last / self.multiple for length in final)  # type: ignore[operator]
        height, width = (self.multiple * max(1, math.floor(count + 0.5)) for count in steps)
        return height, width


def with_magnitude(policy: str | None, magnitude: int | None) -> str | None:
    """Return a RandAugment policy (`rand-m9-mstd0.5-inc1`) with another magnitude; other policies have none."""
    if policy is None or magnitude is None or not policy.startswith("rand"):
        return policy
    parts = [part for part in policy.split("-")[1:] if not re.fullmatch(r"m\d+", part)]
    return "-".join(("rand", f"m{magnitude}", *parts))


class PhasedViews:
    """Views of training images, in the size and with the magnitude of the epoch.

    Args:
        phases: phases of the training.
        augment: augmentation, whose magnitude the phases replace.
        spec: the network's input at the final size.
        hflip: probability of a horizontal flip, if `augment` does not set it.
    """

    def __init__(self, phases: Phases, augment: Augmentation, spec: InputSpec, hflip: float) -> None:
        self.phases = phases
        self.views: dict[Phase, TrainingViews] = {}
        for phase in phases.phases:
            changed = replace(augment, auto_augment=with_magnitude(augment.auto_augment, phase.magnitude))
            crop_size = phase.size if phases.downscale == "crop" else spec.size
            flips = hflip if augment.hflip is None else augment.hflip
            self.views[phase] = TrainingViews(changed, crop_size, flips, output=phase.size)
        policy, has_magnitudes = augment.auto_augment, any(phase.magnitude is not None for phase in phases.phases)
        if has_magnitudes and not (policy and policy.startswith("rand")):
            log.warning(
                "phases: augment.auto_augment=%s has no magnitude to change; phases only change the image size.",
                policy or "null",
            )

    def draw_view(self, size: tuple[int, int], seed: int, epoch: int, *key: int) -> View:
        """Draw the view of an image of (height, width) pixels.

        Args:
            size: (height, width) of the image, in pixels.
            seed: seed of the training.
            epoch: epoch, which decides on the phase.
            key: what else the draws depend on, such as (index, repeat).
        """
        return self.views[self.phases.at(epoch)].draw_view(size, seed, epoch, *key)
