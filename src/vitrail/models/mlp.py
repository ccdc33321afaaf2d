"""timm's MLP with fewer activations kept for the backward pass.

Shapes: B images, N tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LeanLinear(torch.autograd.Function):
    """linear(before(x)) that stores only x and recomputes before(x), a norm or an activation, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, before: nn.Module, x: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.before, ctx.parameters = before, parameters
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return F.linear(before(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):  # as in the forward pass
            x = x.detach().requires_grad_()
            y = ctx.before(x)
        rows = grad.flatten(0, -2)
        grad_weight = rows.mT @ y.detach().flatten(0, -2).to(grad.dtype)
        grad_y = (grad @ weight.to(grad.dtype)).to(y.dtype)
        grad_x, *others = torch.autograd.grad(y, (x, *ctx.parameters), grad_y)
        return None, grad_x, grad_weight.to(weight.dtype), rows.sum(0).to(weight.dtype), *others


def _lean_linear(before: nn.Module, x: Tensor, linear: nn.Linear) -> Tensor:
    return _LeanLinear.apply(before, x, linear.weight, linear.bias, *before.parameters())


class LeanMlp(Mlp):
    """timm's MLP and the norm before it, storing neither the normalised input nor the activated hidden layer.

    Both are recomputed in the backward pass. This costs about 1 % of the time of a training step and saves a quarter of
    a block's memory; results are the same. When compiled, timm's own forward pass is used, because the compiler chooses
    what to recompute.
    """

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Map (B, N, C) to the same shape; apply `norm` to x first if it is given."""
        hidden_dropout = self.training and self.drop1.p > 0
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled() or hidden_dropout
        if plain or not isinstance(self.norm, nn.Identity) or self.fc2.bias is None:
            return super().forward(x if norm is None else norm(x))
        hidden = self.fc1(x) if norm is None else _lean_linear(norm, x, self.fc1)
        return self.drop2(_lean_linear(self.act, hidden, self.fc2))


def normed_mlp(mlp: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Return mlp(norm(x)) (B, N, C) for x (B, N, C), fused if the MLP is a `LeanMlp`."""
    return mlp(x, norm) if isinstance(mlp, LeanMlp) else mlp(norm(x))
