"""Measure whether a map of importance is faithful to the network: deletion and insertion curves.

Petsiuk, Das and Saenko (RISE, arXiv:1806.07421): the pixels of an image are removed in the order of their importance,
or added to a blurred image, and the probability of a class is followed. A faithful map has a small area under the
deletion curve, and a large one under the insertion curve.

Shapes: B images of H x W pixels, S steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pixels


class Curves(NamedTuple):
    """Probability of the class after each step, from none to all of the pixels, and the areas under the curves."""

    deletion: Tensor  # (B, S + 1)
    insertion: Tensor  # (B, S + 1)

    def areas(self) -> tuple[Tensor, Tensor]:
        """Return the areas (B,) under the deletion and the insertion curves, for shares of pixels from 0 to 1."""
        steps = self.deletion.shape[1] - 1
        return torch.trapezoid(self.deletion, dx=1 / steps), torch.trapezoid(self.insertion, dx=1 / steps)


@torch.no_grad()
def perturbation_curves(
    model: nn.Module, images: Tensor, importance: Tensor, classes: Tensor, steps: int = 20, blur: float = 5.0
) -> Curves:
    """Return the deletion and insertion curves of a map of importance for each image.

    Deleted pixels become 0, the mean of the normalisation. The batches have B images, so memory does not grow with
    `steps`.

    Args:
        model: network that gives logits (B, C), in evaluation mode.
        images: normalised images (B, 3, H, W).
        importance: importance (B, rows, columns) of the places of each image, resized to pixels.
        classes: class (B,) whose probability is followed.
        steps: number of steps, S.
        blur: standard deviation in pixels of the blur of the image that the insertion starts from.
    """
    height, width = images.shape[-2:]
    order = F.interpolate(importance[:, None].float(), (height, width), mode="bilinear").flatten(1)
    ranks = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view(-1, 1, height, width)  # (B, 1, H, W)
    side = min(2 * round(2 * blur) + 1, 2 * min(height, width) - 1)
    blurred = pixels.gaussian_blur(images, [side, side], [blur, blur])
    deletion: list[Tensor] = []
    insertion: list[Tensor] = []
    for step in range(steps + 1):
        first = ranks < round(step / steps * height * width)
        for start, end, curve in ((images, torch.zeros_like(images), deletion), (blurred, images, insertion)):
            probabilities = model(torch.where(first, end, start)).softmax(-1)
            curve.append(probabilities.gather(1, classes[:, None])[:, 0])
    return Curves(torch.stack(deletion, 1), torch.stack(insertion, 1))
