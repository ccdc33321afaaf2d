"""Loader that renders batches on the training device, one batch ahead of the step."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitrail.data.render.device import DeviceRenderer
from vitrail.data.views import Operation
from vitrail.types import Batch, InputSpec


class DeviceLoader:
    """Loader of batches on the training device.

    On a GPU, the next batch is copied and rendered on a stream of its own while the training step runs. Elsewhere each
    batch is rendered when it is asked for.

    Args:
        loader: loader of batches whose images are `RenderPlan`s.
        spec: input of the network.
        device: training device.
        erase_mode: content of erased boxes: `const`, `rand` or `pixel`.
        operations: operations of your own.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        spec: InputSpec,
        device: torch.device,
        erase_mode: str = "pixel",
        operations: Sequence[Operation] = (),
    ) -> None:
        self.loader, self.device = loader, device
        self.dataset, self.sampler = loader.dataset, loader.sampler
        self.batch_size, self.num_workers = loader.batch_size, loader.num_workers
        self.renderer = DeviceRenderer(spec, device, erase_mode, operations)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            return map(self._rendered, self.loader)
        return self._one_ahead()

    def _one_ahead(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        ready: tuple[Batch, torch.cuda.Event] | None = None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                following = self._rendered(batch), stream.record_event()
            if ready is not None:
                yield self._handed_over(*ready)
            ready = following
        if ready is not None:
            yield self._handed_over(*ready)

    def _handed_over(self, batch: Batch, rendered: torch.cuda.Event) -> Batch:
        """Return a batch for use on the current stream, which waits until the batch is rendered."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(rendered)
        for tensor in (batch.image, batch.label, *(batch.label_map or ())):
            tensor.record_stream(current)
        return batch

    def _rendered(self, batch: Batch) -> Batch:
        """Return a batch with its images (B, 3, H, W) and labels on the device."""
        label_map = batch.label_map
        if label_map is not None:
            label_map = type(label_map)(*map(self._moved, label_map))
        image = self.renderer(batch.image)  # type: ignore[arg-type]  # a plan until here
        return batch._replace(image=image, label=self._moved(batch.label), label_map=label_map)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
