"""Adaptive gradient clipping (AGC; Brock et al., arXiv:2102.06171, section 4), by timm."""

from typing import Any

import lightning as L
import torch
from timm.utils.agc import adaptive_clip_grad

from vitrail.training.muon import WholeNorms
from vitrail_runtime.checking import Positive, checked


@checked
class AdaptiveClip(L.Callback):
    """Callback that clips the gradient of each unit to a share of the norm of its weights, before each optimiser step.

    A unit is what leads to one output: a row of a matrix, a filter, a whole vector. Weight norms below 0.001 count as
    0.001. `train/grad_norm` is the norm after this clipping; `trainer.gradient_clip_val` clips afterwards.

    Args:
        factor: largest ratio of gradient norm to weight norm; None does not clip.
    """

    def __init__(self, factor: Positive | None = None) -> None:
        self.factor = factor

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the gradients of all parameters of the optimiser, in place."""
        if self.factor is not None:
            parameters: list[Any] = [value for group in optimizer.param_groups for value in group["params"]]
            with WholeNorms():
                adaptive_clip_grad(parameters, self.factor)
