"""Predictions for whole images: a sliding window or the image at once, at several scales, mirrored too.

Windows, resizes and averages are mmsegmentation's: logits of overlapping windows are averaged and resized to the
original image, and the class probabilities of several scales and of the mirrored image are averaged.

Shapes: C classes, H x W pixels of the original image, N windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitrail.data.segmentation.augment import fitted_size, normalised, resized
from vitrail.errors import ConfigError

_AT_ONCE = 8  # windows in one forward pass


def window_origins(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixel of each window along one side; the last window is shifted back into the image.

    Args:
        length: length of the side in pixels.
        window: length of a window.
        stride: pixels between two windows.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride + window, length) - window, 0) for number in range(count)]


@dataclass(frozen=True)
class DenseInference:
    """How to predict a whole image.

    Attributes:
        mean: mean of the normalisation.
        std: standard deviation of the normalisation.
        window: (height, width) of the window, for which the network was trained.
        mode: `slide` a window, or predict the `whole` image, padded to a multiple of `multiple`.
        stride: (rows, columns) between two windows; None means two thirds of the window, rounded down.
        short_side: shorter side that images are resized to.
        long_side: limit of the longer side.
        scales: factors of that size.
        flip: also predict the mirrored image.
        multiple: sides of a whole image are padded to a multiple of this number of pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    window: tuple[int, int]
    mode: Literal["slide", "whole"] = "slide"
    stride: tuple[int, int] | None = None
    short_side: int = 512
    long_side: int = 2048
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    multiple: int = 32

    def __post_init__(self) -> None:
        if not self.scales:
            raise ConfigError("data.eval_scales: is empty; set it to [1.0].")
        if any(step > side for step, side in zip(self.steps, self.window, strict=True)):
            raise ConfigError(f"data.eval_stride={list(self.steps)}: larger than the window, which leaves gaps.")

    @property
    def steps(self) -> tuple[int, int]:
        """(rows, columns) between two windows."""
        height, width = self.window
        return self.stride or (height * 2 // 3, width * 2 // 3)

    def describe(self) -> str:
        """Return the settings in words, which every reported figure depends on."""
        how = "whole images" if self.mode == "whole" else f"window {self.window[0]} x {self.window[1]}"
        stride = "" if self.mode == "whole" else f", stride {' x '.join(map(str, self.steps))}"
        scales = "single scale" if list(self.scales) == [1.0] else f"scales {', '.join(f'{s:g}' for s in self.scales)}"
        return f"{how}{stride}, shorter side {self.short_side}, {scales}{', mirrored too' if self.flip else ''}"

    def __call__(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Return the class probabilities (C, H, W) of an image (3, H, W), uint8.

        Args:
            model: maps normalised images (N, 3, height, width) to logits (N, C, height, width).
            image: image in its original size.
        """
        original = (image.shape[-2], image.shape[-1])
        total: Tensor | None = None
        views = [(scale, flip) for scale in self.scales for flip in ((False, True) if self.flip else (False,))]
        for scale, flip in views:
            sides = fitted_size(original, scale * self.short_side, scale * self.long_side)
            view = normalised(resized(image, sides), self.mean, self.std)
            logits = self._logits(model, view.flip(-1) if flip else view)
            logits = torch.nn.functional.interpolate(logits, original, mode="bilinear", align_corners=False)
            scores = logits[0].softmax(0)
            scores = scores.flip(-1) if flip else scores
            total = scores if total is None else total + scores
        assert total is not None
        return total / len(views)

    def _logits(self, model: Callable[[Tensor], Tensor], view: Tensor) -> Tensor:
        """Return the logits (1, C, height, width) of a normalised image (3, height, width)."""
        height, width = view.shape[-2:]
        if self.mode == "whole":
            return model(self._grown(view, *(-(-side // self.multiple) * self.multiple for side in (height, width))))[
                :, :, :height, :width
            ]
        rows, columns = self.window
        view = self._grown(view, max(height, rows), max(width, columns))[0]
        places = self._places(view.shape[1], view.shape[2])
        total: Tensor | None = None
        counts = view.new_zeros(view.shape[1:])
        for first in range(0, len(places), _AT_ONCE):
            part = places[first : first + _AT_ONCE]
            windows = torch.stack([view[:, top : top + rows, left : left + columns] for top, left in part])
            for (top, left), logits in zip(part, model(windows).float(), strict=True):
                if total is None:
                    total = logits.new_zeros(len(logits), *view.shape[1:])
                total[:, top : top + rows, left : left + columns] += logits
                counts[top : top + rows, left : left + columns] += 1
        assert total is not None
        return (total / counts)[None, :, :height, :width]

    def _places(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return top and left of each window of an image that is at least as large as a window."""
        rows, columns = (
            window_origins(length, window, step)
            for length, window, step in zip((height, width), self.window, self.steps, strict=True)
        )
        return [(top, left) for top in rows for left in columns]

    def forward_passes(self, size: tuple[int, int]) -> int:
        """Return the number of forward passes for an image of (height, width) pixels."""
        views = len(self.scales) * (2 if self.flip else 1)
        if self.mode == "whole":
            return views
        passes = 0
        for scale in self.scales:
            sides = fitted_size(size, scale * self.short_side, scale * self.long_side)
            passes += -(-len(self._places(max(sides[0], self.window[0]), max(sides[1], self.window[1]))) // _AT_ONCE)
        return passes * views // len(self.scales)

    @staticmethod
    def _grown(view: Tensor, height: int, width: int) -> Tensor:
        """Pad a normalised image with 0 at the bottom right; return it as a batch (1, 3, height, width)."""
        return torch.nn.functional.pad(view, (0, width - view.shape[-1], 0, height - view.shape[-2]))[None]
