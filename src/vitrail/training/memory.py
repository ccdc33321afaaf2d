"""Memory of a training step by part, the kernels that it launches, and the error when memory runs out."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vitrail.checkpoints.shards import local
from vitrail.errors import TrainingError
from vitrail.training.classifier import ImageClassifier
from vitrail.training.ema import EMA


def memory_by_part(trainer: L.Trainer, module: ImageClassifier) -> dict[str, int]:
    """Return the bytes of `weights`, `gradients`, `optimizer` and `average` on one device; of shards, its own.

    Weights include buffers and the teacher. Gradients are those of all trained parameters, whether or not they exist
    at the moment. An average on another device than the network does not count.
    """
    teacher = module.targets.teacher
    whole = [*module.parameters(), *module.buffers()]
    if teacher is not None:
        whole += [*teacher.parameters(), *teacher.buffers()]
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    averages = [
        tensor
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, EMA) and callback.device in (None, trainer.strategy.root_device.type)
        for tensor in callback.average.values()
    ]
    return {
        "weights": _bytes(whole),
        "gradients": _bytes(parameter for parameter in module.parameters() if parameter.requires_grad),
        "optimizer": _bytes(value for state in states for value in state.values() if isinstance(value, Tensor)),
        "average": _bytes(averages),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in (local(tensor.detach()) for tensor in tensors))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, Exception) and is_oom_error(error))


def out_of_memory(trainer: L.Trainer, module: ImageClassifier, batch_size: int, checkpointed: bool) -> TrainingError:
    """Return the error for the user when a training has run out of memory: one sentence with the memory by part.

    Args:
        trainer: trainer whose `fit` has failed.
        module: its module.
        batch_size: `data.batch_size`, images per step on one device.
        checkpointed: `grad_checkpointing`.
    """
    parts = memory_by_part(trainer, module)
    names = {"optimizer": "optimiser state", "average": "EMA weights"}
    listed = [f"{names.get(name, name)} {value / 2**30:.2f}" for name, value in parts.items()]
    device = trainer.strategy.root_device
    if device.type == "cuda":
        rest = max(0, torch.cuda.max_memory_allocated(device) - sum(parts.values()))
        total = torch.cuda.get_device_properties(device).total_memory
        listed.append(f"activations and the rest {rest / 2**30:.2f} of {total / 2**30:.2f}")
    half = max(1, batch_size // 2)
    accumulated = 2 * trainer.accumulate_grad_batches
    advice = f"Set data.batch_size={half} trainer.accumulate_grad_batches={accumulated} (the same effective batch)"
    advice += "" if checkpointed else ", or grad_checkpointing=true"
    return TrainingError(
        f"data.batch_size={batch_size}: out of memory on {device} in epoch {trainer.current_epoch + 1}, step"
        f" {trainer.global_step + 1}, with grad_checkpointing={str(checkpointed).lower()}; GiB: {', '.join(listed)}."
        f" {advice}."
    )


class StepMemory(L.Callback):
    """Callback that measures the memory and the kernel launches of two steps.

    Args:
        first: batch at which the memory by part is measured; the batch after it counts kernel launches, and on a CPU
            measures the peak.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.parts: dict[str, int] = {}
        """Bytes by part, once they are measured, with `activations`: what the forward pass keeps for the backward."""
        self.peak = 0
        """Highest number of bytes at once."""
        self.launches: int | None = None
        """Kernels that the host launches in a step; None on a CPU, or if the profiler cannot trace the device."""
        self._trace: MemoryTrace | None = None
        self._before = self._batch = self._forward = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start to measure."""
        self._batch = batch_idx
        on_gpu = pl_module.device.type == "cuda"
        if batch_idx == self.first and on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif batch_idx in (self.first, self.first + 1):
            self._trace = MemoryTrace(on_gpu)
            self._trace.start()

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the activations: after the forward pass, and before the last step's gradients are freed."""
        if self._batch != self.first:
            return
        self.parts = memory_by_part(trainer, pl_module)  # type: ignore[arg-type]
        if self._trace is None:
            self.parts["activations"] = torch.cuda.memory_allocated() - self._before
        else:
            self._trace.stop()
            self.parts["activations"], self._forward = self._trace.held, self._trace.highest
            self._trace = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the peak."""
        on_gpu = pl_module.device.type == "cuda"
        if batch_idx == self.first and on_gpu:
            self.peak = torch.cuda.max_memory_allocated()
        if batch_idx != self.first + 1 or self._trace is None:
            return
        self._trace.stop()
        if on_gpu:
            self.launches = self._trace.launches or None
        else:
            # The last step's gradients exist in the forward pass; a trace does not see that they are freed after it.
            kept = sum(self.parts[part] for part in ("weights", "optimizer", "average"))
            self.peak = kept + max(self.parts["gradients"] + self._forward, self._trace.highest)
        self._trace = None


class MemoryTrace:
    """Trace of PyTorch's allocations on the CPU, or of the kernel launches on a GPU, between `start` and `stop`."""

    def __init__(self, on_gpu: bool = False) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler = profile(activities=activities, profile_memory=not on_gpu)
        self.held = self.highest = self.launches = 0
        """Bytes allocated and not freed; the most at once; kernel launches."""
        self._silence = ExitStack()

    def start(self) -> None:
        """Start the trace."""
        self._silence.enter_context(_quiet())
        self._profiler.start()

    def stop(self) -> None:
        """End the trace, and sum it up."""
        self._profiler.stop()
        self._silence.close()
        kineto: Any = self._profiler.profiler
        events = kineto.kineto_results.events()
        self.launches = sum(event.name().startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for event in events)
        memory = [event for event in events if event.name() == "[memory]"]
        for event in sorted(memory, key=lambda event: event.start_ns()):
            self.held += event.nbytes()
            self.highest = max(self.highest, self.held)


def extra_memory(step: Callable[[], Any]) -> int:
    """Return the peak memory of a step on the CPU in bytes, above the memory in use before it."""
    trace = MemoryTrace()
    trace.start()
    try:
        step()
    finally:
        trace.stop()
    return trace.highest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence stderr within the block: the profiler writes to it on machines without a GPU."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stderr.flush()
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
