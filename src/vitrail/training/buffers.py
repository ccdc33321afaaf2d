"""Buffers, such as BatchNorm's running statistics, that every process keeps for itself."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def share_buffers(buffers: Iterable[Tensor]) -> None:
    """Give all processes the buffers of the first one, in place; one process alone keeps its own.

    The first process writes the checkpoints, at any step, so its buffers are those to measure. They depend on its own
    batches only, whether or not DDP shares them at each step (`strategy.broadcast_buffers`); FSDP never does.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    device = "cuda" if torch.distributed.get_backend() == "nccl" else None
    for buffer in buffers:
        if not isinstance(buffer, DTensor):
            shared = buffer if device is None else buffer.to(device)  # averages may be kept on the CPU
            torch.distributed.broadcast(shared, 0)
            if shared is not buffer:
                buffer.copy_(shared)
