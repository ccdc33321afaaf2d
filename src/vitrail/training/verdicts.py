"""Verdict on the numbers of an optimiser step: made on the device, and read by the host without waiting for the device.

On a GPU the host is about a step ahead. It therefore reads the verdict of a step when it has launched the next forward
and backward pass, and the device itself keeps the optimiser from using bad numbers.

Shapes: P parameters with gradients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.checkpoints.shards import local


@dataclass
class Step:
    """One optimiser step that is being judged.

    Attributes:
        epoch: epoch, counted from 0.
        number: optimiser steps before this one.
        batches: its batches, each with its random key.
        loss: scalar loss on this process.
        norms: (P,) norms of the gradients; None if only the loss is judged.
        names: the parameters' names, P in the order of `norms`.
        bad: scalar float32 on the device, the same on all processes: 1 if a number is NaN or infinite, else 0.
    """

    epoch: int
    number: int
    batches: list[tuple[Any, tuple[int, ...]]]
    loss: Tensor
    norms: Tensor | None
    names: list[str]
    bad: Tensor

    def bad_gradients(self) -> list[str]:
        """Return the names of the parameters with a non-finite gradient."""
        if self.norms is None:
            return []
        finite = self.norms.isfinite().tolist()
        return [name for name, is_finite in zip(self.names, finite, strict=True) if not is_finite]


def judge(loss: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return whether a norm is NaN or infinite, as 1 or 0 on the device, and the norms (P,) of the gradients.

    All processes agree without communication: the reduction of the gradients has taken a bad number to all of them
    (to those with shards, by `vitrail.training.fsdp.SpoilingReduction`). Shards have different norms, which are
    therefore not added: their sum could overflow on one process only.
    """
    worst, norms = loss.float(), None
    if grads:
        norms = torch.stack([norm.float() for norm in torch._foreach_norm([local(grad) for grad in grads])])
        worst = worst + (norms * 0).sum().to(loss.device)
    return worst.isfinite().logical_not().float(), norms


def spoil_gradients(loss: Tensor) -> None:
    """Make all gradients NaN if the scalar `loss` is not finite, so that their reduction tells every process."""
    if loss.requires_grad:
        value = loss.detach()
        loss.register_hook(lambda grad: torch.where(value.isfinite(), grad, torch.full_like(grad, float("nan"))))


class HostReader:
    """Reader of verdicts for devices that compute while the host waits: the verdict is there at once."""

    late = False

    def __init__(self) -> None:
        self.verdict = self._new_verdict()
        self._value = self.verdict.numpy()  # the same memory
        self.pending: Step | None = None

    def _new_verdict(self) -> Tensor:
        return torch.zeros(())

    def post(self, step: Step) -> None:
        """Start to read the verdict of a step."""
        self.pending = step
        self.verdict.copy_(step.bad, non_blocking=self.late)

    def take(self) -> Step | None:
        """Return the step posted last if its verdict is bad, and forget it."""
        step, self.pending = self.pending, None
        return step if step is not None and self._is_bad() else None

    def _is_bad(self) -> bool:
        return bool(self._value != 0)


class DeviceReader(HostReader):
    """Reader of verdicts from a GPU, through pinned memory."""

    late = True

    def __init__(self) -> None:
        super().__init__()
        self.copied = torch.cuda.Event()

    def _new_verdict(self) -> Tensor:
        return torch.zeros((), pin_memory=True)

    def post(self, step: Step) -> None:
        """Start to read the verdict of a step."""
        super().post(step)
        self.copied.record()

    def _is_bad(self) -> bool:
        self.copied.synchronize()  # the device is past it, unless it is more than a step behind
        return super()._is_bad()


class Brake:
    """Brake that lets the device skip the optimiser's update of a bad step.

    PyTorch's fused Adam and AdamW and vitrail's LAMB do it themselves. For others, the gradients of a bad step become
    zero, and weights and moments are restored from copies, which exist only during the update, after activations are
    freed. (PyTorch's fused SGD leaves its momentum without a value if its first step is skipped.)
    """

    def __init__(self, optimizer: Any) -> None:
        self.base = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead wraps another optimiser
        fused = isinstance(self.base, torch.optim.Adam) and all(group.get("fused") for group in self.base.param_groups)
        self.reads_found_inf = fused or bool(getattr(self.base, "reads_found_inf", False))
        self._bad: Tensor | None = None
        self._known: set[tuple[Any, str]] = set()
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._counts: list[tuple[Tensor, Tensor]] = []
        if not self.reads_found_inf:
            self.base.register_step_post_hook(self._restore)

    def set(self, bad: Tensor, grads: Iterable[Tensor]) -> None:
        """Skip the coming update if `bad`, a scalar on the device, is 1."""
        if self.reads_found_inf:
            self.base.found_inf = bad
            return
        self._bad = bad.bool()
        for grad in grads:
            local(grad).masked_fill_(self._bad.to(grad.device), 0)
        weights = [weight for group in self.base.param_groups for weight in group["params"]]
        tensors = [local(tensor.detach()) for tensor in (*weights, *self._state().values())]
        copies = [(tensor, tensor.clone()) for tensor in tensors]
        self._known = set(self._state())
        self._copies = [pair for pair in copies if pair[0].device == bad.device]
        self._counts = [pair for pair in copies if pair[0].device != bad.device]

    def _state(self) -> dict[tuple[Any, str], Tensor]:
        """Return the moments and step counts of the optimiser, by parameter or group and name."""
        groups: Any = enumerate(self.base.param_groups)
        owners = [*self.base.state.items(), *((number, {"step": group.get("step")}) for number, group in groups)]
        return {
            (owner, name): value for owner, held in owners for name, value in held.items() if isinstance(value, Tensor)
        }

    def release(self) -> None:
        """Restore the step counts that the host keeps, once it knows that the last step was bad."""
        for tensor, before in self._counts:
            tensor.copy_(before)

    def _restore(self, *_: Any) -> None:
        if self._bad is None:
            return
        new = {key: value for key, value in self._state().items() if key not in self._known}
        steps = [(value, torch.zeros_like(value)) for (_, name), value in new.items() if name == "step"]
        for tensor, before in steps:  # counted from the first step; new moments are those of gradients of zero
            (self._copies if tensor.device == self._bad.device else self._counts).append((tensor, before))
        if self._copies:
            restore_if(self._bad, *zip(*self._copies, strict=True))
        self._bad, self._copies = None, []


@torch.no_grad()
def restore_if(bad: Tensor, tensors: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Set each tensor to its former value if `bad`, a scalar on the device, is 1."""
    for tensor, former in zip(tensors, before, strict=True):
        torch.where(bad.bool(), former, tensor, out=tensor)


def gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[str], list[Tensor]]:
    """Return the names and the gradients of the parameters that have one."""
    found = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    return [name for name, _ in found], [grad for _, grad in found]
