"""Non-blocking all-reduce (maximum) of a few integers, which the host reads without waiting for a GPU."""

from collections.abc import Sequence

import torch


class Poll:
    """Maximum over all processes of some numbers; every process must ask and read at the same batches.

    On a GPU the numbers travel on a stream of their own, and the answer comes to pinned memory. If it is read a step
    after the question, it has arrived: the reduction of that step's gradients has brought the processes together.

    Args:
        device: device whose process group is asked.
        count: how many numbers a question has.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.late = device.type == "cuda"
        self.pending = False
        self._device = device
        self._sent, self._received = (torch.zeros(count, dtype=torch.int64, pin_memory=self.late) for _ in range(2))
        self._values = self._received.numpy()  # the same memory
        if self.late:
            self._stream, self._arrived = torch.cuda.Stream(device), torch.cuda.Event()

    def ask(self, numbers: Sequence[int]) -> None:
        """Send this process's numbers."""
        self.pending = True
        if not self.late:
            self._received.copy_(torch.tensor(numbers))
            torch.distributed.all_reduce(self._received, torch.distributed.ReduceOp.MAX)
            return
        self._sent.copy_(torch.tensor(numbers))
        with torch.cuda.stream(self._stream):
            held = self._sent.to(self._device, non_blocking=True)
            torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
            self._received.copy_(held, non_blocking=True)
            self._arrived.record()

    def answer(self) -> list[int]:
        """Return the maximum of each number over all processes."""
        self.pending = False
        if self.late:
            self._arrived.synchronize()
        return [int(value) for value in self._values]
