"""Adaptive gradient clipping (AGC; Brock et al., arXiv:2102.06171, section 4)."""

import lightning as L
import torch
from torch import Tensor

from vitrail_runtime.checking import Positive, checked


@checked
class AdaptiveClip(L.Callback):
    """Callback that clips the gradient of each unit to a share of the norm of its weights, before each optimiser step.

    A unit is what leads to one output: a row of a matrix, a filter, a whole vector. Weight norms below 0.001 count as
    0.001. Equal to timm's `adaptive_clip_grad`, which fails on sharded parameters. `train/grad_norm` is the norm after
    this clipping; `trainer.gradient_clip_val` clips afterwards.

    Args:
        factor: largest ratio of gradient norm to weight norm; None does not clip.
    """

    def __init__(self, factor: Positive | None = None) -> None:
        self.factor = factor

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the gradients of all parameters of the optimiser, in place."""
        if self.factor is None:
            return
        for parameter in (value for group in optimizer.param_groups for value in group["params"]):
            if parameter.grad is not None:
                largest = self.factor * _unit_norms(parameter).clamp(min=1e-3)
                scale = largest / _unit_norms(parameter.grad).clamp(min=1e-6)
                parameter.grad.mul_(scale.clamp(max=1))


def _unit_norms(x: Tensor) -> Tensor:
    """Return the norm over all axes but the first (n, 1, ...); of a vector, its norm ()."""
    axes = tuple(range(1, x.ndim)) or None
    return torch.linalg.vector_norm(x, dim=axes, keepdim=axes is not None)
