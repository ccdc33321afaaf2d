"""Values of steps as the device needs them: tables, matrices and weights."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vitrail.data.views import rotation
from vitrail.types import Step

TABLES = ("autocontrast", "equalize", "contrast", "fixed")
"""Operations that map each value on its own, by number; `fixed` tables are known in advance."""

BOX_PASSES = 3
"""Box filters in each direction that approximate Pillow's Gaussian blur."""

Values = Callable[[Step, tuple[int, int]], tuple[str, Sequence[float]]]
_IDENTITY = np.arange(256, dtype=np.float64)


def own_values(step: Step, _: tuple[int, int]) -> tuple[str, Sequence[float]]:
    """Return name and values of an operation that needs nothing else."""
    return step.name, step.values


def _table(number: int, table: NDArray[np.float64] = _IDENTITY, factor: float = 1.0) -> tuple[str, Sequence[float]]:
    return "table", np.concatenate(([number, factor], table))  # type: ignore[return-value]


def _fixed(make: Callable[..., NDArray[np.float64]]) -> Values:
    return lambda step, _: _table(TABLES.index("fixed"), make(*step.values))


def _brightness(factor: float) -> NDArray[np.float64]:
    return np.trunc(np.clip(np.float32(factor) * np.arange(256, dtype=np.float32), 0, 255)).astype(np.float64)


def _posterize(bits: int) -> NDArray[np.float64]:
    return np.floor(_IDENTITY / 2 ** (8 - bits)) * 2 ** (8 - bits) if bits > 0 else np.zeros(256)


def _affine(step: Step, size: tuple[int, int]) -> tuple[str, Sequence[float]]:
    matrix = step.values[:6] if step.name == "affine" else rotation(step.values[0], size)
    return step.values[-1], matrix


def _blur(step: Step, _: tuple[int, int]) -> tuple[str, Sequence[float]]:
    """Return radius and weights of the box filters that approximate a Gaussian (Gwosdek et al., SSVM 2011)."""
    single = np.float32  # Pillow's precision
    variance = single(step.values[0]) ** 2 / single(BOX_PASSES)
    length = single(math.sqrt(12.0 * float(variance) + 1.0))
    whole = single(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = single(whole + part)
    inner = int(single(1 << 24) / (radius * 2 + 1))
    outer = ((1 << 24) - (int(radius) * 2 + 1) * inner) // 2
    return "blur", (int(radius), inner / (1 << 24), outer / (1 << 24))


VALUES: dict[str, Values] = {
    "autocontrast": lambda *_: _table(TABLES.index("autocontrast")),
    "equalize": lambda *_: _table(TABLES.index("equalize")),
    "contrast": lambda step, _: _table(TABLES.index("contrast"), factor=step.values[0]),
    "invert": _fixed(lambda: 255 - _IDENTITY),
    "posterize": _fixed(_posterize),
    "solarize": _fixed(lambda threshold: np.where(threshold > _IDENTITY, _IDENTITY, 255 - _IDENTITY)),
    "solarize_add": _fixed(lambda added: np.where(_IDENTITY < 128, np.minimum(255, _IDENTITY + added), _IDENTITY)),
    "brightness": _fixed(_brightness),
    "affine": _affine,
    "rotate": _affine,
    "blur": _blur,
}
"""Kind of a step by its name, and its values; a table has the number of its kind, a factor and 256 values."""
