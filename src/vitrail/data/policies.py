"""Policies: RandAugment, AutoAugment, 3-Augment and AugMix, with timm's draws.

Which operations a policy has, with which probability and magnitude, is read from timm's objects.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import (
    AugMixAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)

from vitrail.data.randomness import generator_seeds
from vitrail.types import Step

Size = tuple[int, int]
"""(height, width) in pixels."""

_LEVELS = 10.0  # timm's magnitudes count tenths


class Draws:
    """Random generators of one view: Python's, NumPy's and PyTorch's, seeded as `randomness.seeded` seeds them."""

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = random.Random(), np.random.RandomState(), torch.Generator()
        self.count = 0
        """Numbers drawn from PyTorch's generator."""

    def seed(self, *key: int) -> int:
        """Seed the generators with `key`, and return the seed of PyTorch's."""
        python, numpy, torch_seed = generator_seeds(*key)
        self.python.seed(python)
        self.numpy.seed(numpy)
        self.torch.manual_seed(torch_seed)
        self.count = 0
        return torch_seed

    def share(self) -> float:
        """Return a number in [0, 1) from PyTorch's generator."""
        self.count += 1
        return float(torch.rand(1, generator=self.torch))

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high) from PyTorch's generator."""
        self.count += 1
        return float(torch.empty(1).uniform_(low, high, generator=self.torch))

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound) from PyTorch's generator."""
        self.count += 1
        return int(torch.randint(0, bound, (1,), generator=self.torch))

    def order(self, count: int) -> list[int]:
        """Return the numbers below `count` in random order, from PyTorch's generator."""
        self.count += count - 1
        return torch.randperm(count, generator=self.torch).tolist()


class PolicyOperation(NamedTuple):
    """One operation of RandAugment, AutoAugment or AugMix, as timm configures it."""

    name: str
    prob: float
    magnitude: float
    std: float
    bound: float
    translate_pixels: float
    translate_share: float
    kernels: tuple[str, ...]

    def draw(self, draws: Draws, size: Size) -> Step | None:
        """Draw whether and how to apply the operation to an image of `size`."""
        if self.prob < 1 and draws.python.random() > self.prob:
            return None
        magnitude = self.magnitude
        if self.std == float("inf"):
            magnitude = draws.python.uniform(0, magnitude)
        elif self.std > 0:
            magnitude = draws.python.gauss(magnitude, self.std)
        level = max(0.0, min(magnitude, self.bound)) / _LEVELS
        return _OPERATIONS[self.name](_Chance(self, level, draws, size))

    def kernel(self, draws: Draws) -> str:
        """Draw the kernel of a geometric operation."""
        return self.kernels[0] if len(self.kernels) == 1 else draws.python.choice(self.kernels)


class Policy:
    """RandAugment, AutoAugment or AugMix, read from timm's object for a policy string; None draws nothing."""

    def __init__(self, text: str | None, output: Size, kernel: str) -> None:
        options: dict[str, Any] = {"translate_const": int(min(output) * 0.45)}
        if kernel != "random":
            options["interpolation"] = kernel
        self.mix: AugMixAugment | None = None
        self.sub_policies: list[list[PolicyOperation]] = []
        self.operations: list[PolicyOperation] = []
        if text is None:
            return
        if text.startswith("rand"):
            made = rand_augment_transform(text, options)
            self.operations = [_policy_operation(operation) for operation in made.ops]
            self.layers, self.weights = made.num_layers, made.choice_weights
        elif text.startswith("augmix"):
            self.mix = augment_and_mix_transform(text, {**options, "translate_pct": 0.3})
            self.operations = [_policy_operation(operation) for operation in self.mix.ops]
        else:
            self.sub_policies = [
                [_policy_operation(operation) for operation in policy]
                for policy in auto_augment_transform(text, options).policy
            ]

    def draw(self, draws: Draws, size: Size) -> list[Step]:
        """Draw the steps for an image of `size`."""
        if self.mix is not None:
            return [self._draw_augmix(self.mix, draws, size)]
        if self.sub_policies:
            chosen = draws.python.choice(self.sub_policies)
        else:
            count = len(self.operations)
            if self.weights is None:  # the draws of `choice`, in half its time
                numbers = draws.numpy.randint(0, count, self.layers)
            else:
                numbers = draws.numpy.choice(count, self.layers, replace=False, p=self.weights)
            chosen = [self.operations[number] for number in numbers]
        return [step for operation in chosen if (step := operation.draw(draws, size)) is not None]

    def _draw_augmix(self, mix: AugMixAugment, draws: Draws, size: Size) -> Step:
        weights = draws.numpy.dirichlet([mix.alpha] * mix.width).astype(np.float32)
        share = np.float32(draws.numpy.beta(mix.alpha, mix.alpha))
        chains = []
        for _ in range(mix.width):
            depth = mix.depth if mix.depth > 0 else draws.numpy.randint(1, 4)
            numbers = draws.numpy.choice(len(self.operations), depth, replace=True)
            steps = (self.operations[number].draw(draws, size) for number in numbers)
            chains.append(tuple(step for step in steps if step is not None))
        return Step("augmix", (tuple(weights.tolist()), float(share), bool(mix.blended), tuple(chains)))


def _policy_operation(operation: Any) -> PolicyOperation:
    """Read one of timm's operations."""
    kernels, options = operation.kwargs["resample"], operation.hparams
    if isinstance(kernels, str):
        names: tuple[str, ...] = (kernels,)
    else:
        names = tuple(Image.Resampling(kernel).name.lower() for kernel in kernels)
    return PolicyOperation(
        operation.name,
        operation.prob,
        operation.magnitude,
        operation.magnitude_std,
        operation.magnitude_max or _LEVELS,
        float(options["translate_const"]),
        options.get("translate_pct", 0.45),
        names,
    )


# Operations: each draws its values and returns a step.


class _Chance(NamedTuple):
    """What an operation draws from: its level goes from 0 to 1, or further if timm's mmax is set."""

    operation: PolicyOperation
    level: float
    draws: Draws
    size: Size

    def signed(self, value: float) -> float:
        """Return `value` with a random sign."""
        return -value if self.draws.python.random() > 0.5 else value

    def clamped(self, low: float, high: float) -> float:
        """Return the level, from `low` to `high`."""
        return max(low, min(high, low + (high - low) * self.level))


_Drawer = Callable[[_Chance], Step | None]


def _rotate(chance: _Chance) -> Step:
    degrees = chance.signed(chance.level * 30.0)
    return Step("rotate", (degrees, chance.operation.kernel(chance.draws)))


def _affine(position: int, change: Callable[[_Chance], float]) -> _Drawer:
    """Return a drawer that sets one number of the identity's matrix, with a random sign."""

    def draw(chance: _Chance) -> Step:
        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        matrix[position] = chance.signed(change(chance))
        return Step("affine", (*matrix, chance.operation.kernel(chance.draws)))

    return draw


def _posterize(bits: Callable[[float], int]) -> _Drawer:
    def draw(chance: _Chance) -> Step | None:
        kept = bits(chance.level)
        return Step("posterize", (kept,)) if kept < 8 else None

    return draw


def _enhance(name: str) -> _Drawer:
    return lambda chance: Step(name, (chance.level * 1.8 + 0.1,))


def _enhance_either_way(name: str) -> _Drawer:
    return lambda chance: Step(name, (max(0.1, 1.0 + chance.signed(chance.level * 0.9)),))


def _random_blur(chance: _Chance) -> Step:
    return Step("blur", (chance.draws.python.uniform(0.1, 2.0 * chance.clamped(0.0, 1.0)),))


_OPERATIONS: dict[str, _Drawer] = {
    "AutoContrast": lambda _: Step("autocontrast"),
    "Equalize": lambda _: Step("equalize"),
    "Invert": lambda _: Step("invert"),
    "Rotate": _rotate,
    "Posterize": _posterize(lambda level: int(level * 4)),
    "PosterizeIncreasing": _posterize(lambda level: 4 - int(level * 4)),
    "PosterizeOriginal": _posterize(lambda level: int(level * 4) + 4),
    "Solarize": lambda chance: Step("solarize", (min(256, int(chance.level * 256)),)),
    "SolarizeIncreasing": lambda chance: Step("solarize", (256 - min(256, int(chance.level * 256)),)),
    "SolarizeAdd": lambda chance: Step("solarize_add", (min(128, int(chance.level * 110)),)),
    "Color": _enhance("color"),
    "ColorIncreasing": _enhance_either_way("color"),
    "Contrast": _enhance("contrast"),
    "ContrastIncreasing": _enhance_either_way("contrast"),
    "Brightness": _enhance("brightness"),
    "BrightnessIncreasing": _enhance_either_way("brightness"),
    "Sharpness": _enhance("sharpness"),
    "SharpnessIncreasing": _enhance_either_way("sharpness"),
    "ShearX": _affine(1, lambda chance: chance.level * 0.3),
    "ShearY": _affine(3, lambda chance: chance.level * 0.3),
    "TranslateX": _affine(2, lambda chance: chance.level * chance.operation.translate_pixels),
    "TranslateY": _affine(5, lambda chance: chance.level * chance.operation.translate_pixels),
    "TranslateXRel": _affine(2, lambda chance: chance.level * chance.operation.translate_share * chance.size[1]),
    "TranslateYRel": _affine(5, lambda chance: chance.level * chance.operation.translate_share * chance.size[0]),
    "Desaturate": lambda chance: Step("color", (min(1.0, max(0.0, 1.0 - chance.clamped(0.5, 1.0))),)),
    "GaussianBlur": lambda chance: Step("blur", (chance.clamped(0.1, 2.0),)),
    "GaussianBlurRand": _random_blur,
}
