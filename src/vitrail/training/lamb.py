"""LAMB (You et al., arXiv:1904.00962) with the arithmetic of timm's `Lamb`, for all parameters at once.

timm's loops over the parameters, with about 20 kernels for each. This one has about 50 for all, for which it needs
memory for several copies of the gradients during the update. It keeps its step count on the device, and skips the
update if the device says so (`found_inf`, as in PyTorch's fused optimisers).

Shapes: P parameters of any shape, of N elements in all.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor
from torch.distributed.tensor import DTensor


class ForeachLamb(Lamb):
    """timm's LAMB, updating all parameters of a group at once."""

    reads_found_inf = True
    found_inf: Tensor | None = None
    """Scalar on the device: 1 to skip the next update, 0 or None not to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once, unless `found_inf` is 1."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if grads := [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]:
            keep = torch.ones((), device=grads[0].device) if self.found_inf is None else 1 - self.found_inf
            clip = self._norm(grads)
            for group in self.param_groups:
                self._update(group, clip, keep)
        return loss

    def _norm(self, grads: list[Tensor]) -> Tensor | None:
        """Return the divisor that clips the gradients' norm, at least 1; None for no clipping."""
        largest = self.defaults["max_grad_norm"]
        if largest is None:
            return None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return (norm / largest).clamp(min=1.0)

    def _update(self, group: dict[str, Any], clip: Tensor | None, keep: Tensor) -> None:
        """Update the parameters of a group, if the scalar `keep` is 1; leave everything as it is if it is 0."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        if clip is not None:
            grads = list(torch._foreach_div(grads, clip))
        grads = _parts(torch.where(keep > 0, _joined(grads, params), 0.0), params)  # NaN times 0 would be NaN
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        moments = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        step = torch.as_tensor(group.get("step", 0), dtype=torch.float32)
        step = step.to(keep.device) + keep
        group["step"] = step
        beta1, beta2 = group["betas"]
        new = (1 - beta1 if group["grad_averaging"] else 1.0) * keep
        _decay(moments, beta1, keep)
        torch._foreach_add_(moments, torch._foreach_mul(grads, new))
        _decay(squares, beta2, keep)
        torch._foreach_add_(squares, torch._foreach_mul(torch._foreach_mul(grads, grads), (1 - beta2) * keep))
        # A skipped first step has a count of 0, for which the corrections would divide by 0.
        count = step.clamp(min=1).double()
        corrections = [1 - beta**count for beta in group["betas"]]
        if not group["bias_correction"]:
            corrections = [torch.ones_like(count)] * 2
        denominators = torch._foreach_div(torch._foreach_sqrt(squares), corrections[1].sqrt())
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(moments, corrections[0]), denominators)
        self._apply(group, params, list(updates), keep)

    def _apply(self, group: dict[str, Any], params: list[Any], updates: list[Tensor], keep: Tensor) -> None:
        """Add weight decay, scale each update to its parameter's norm, and subtract it."""
        lr, decay = group["lr"], group["weight_decay"]
        if decay and group["decoupled_decay"]:
            shrink = (lr**2 / self.defaults["lr"] if group["corrected_weight_decay"] else lr) * decay
            torch._foreach_mul_(params, 1 - shrink * keep)
        elif decay:
            torch._foreach_add_(updates, params, alpha=decay)
        if decay or group["always_adapt"]:
            weights, sizes = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
            ratios = torch.where((weights > 0) & (sizes > 0), weights / sizes, 1.0)
            ratios = ratios.clamp(max=1.0) if group["trust_clip"] else ratios
            repeated = [ratio.expand(p.numel()) for ratio, p in zip(ratios.unbind(), params, strict=True)]
            torch._foreach_mul_(updates, _parts(torch.cat(repeated), params))
        torch._foreach_sub_(params, torch._foreach_mul(updates, lr * keep))


def _decay(tensors: list[Tensor], beta: float, keep: Tensor) -> None:
    """Multiply tensors by `beta` if the scalar `keep` is 1, and by 1 if it is 0, in place."""
    torch._foreach_mul_(tensors, torch.where(keep > 0, beta, 1.0))


def _joined(tensors: list[Tensor], params: list[Tensor]) -> Tensor:
    """Return the elements (N,) of tensors that have the shapes of `params`, in the order of the parameters' memory."""
    ordered = [
        tensor if tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)
        for tensor, p in zip(tensors, params, strict=True)
    ]
    return torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in ordered])


def _parts(joined: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Return the views of `joined` (N,) that have the shapes and the strides of the parameters."""
    parts = joined.split([p.numel() for p in params])
    return [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, params, strict=True)]


def update_at_once(optimizer: Any) -> None:
    """Let timm's LAMB update all parameters at once, in place, if it can: not if sharded, or with timm's caution."""
    base = getattr(optimizer, "_base_optimizer", optimizer)
    sharded = any(isinstance(p, DTensor) for group in base.param_groups for p in group["params"])
    if type(base) is Lamb and not sharded and not any(group["caution"] for group in base.param_groups):
        base.__class__ = ForeachLamb
