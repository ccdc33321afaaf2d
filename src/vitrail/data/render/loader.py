"""Loader that renders batches on the training device, one batch ahead of the step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.data.render.device import DeviceRenderer
from vitrail.types import Batch


class DeviceLoader(DataLoader[Any]):
    """Loader of batches on the training device.

    On a GPU, the next batch is copied and rendered on a stream of its own while the training step runs. Elsewhere each
    batch is rendered when it is asked for.

    Args:
        renderer: renderer on the training device.
        dataset: data set whose images are `Shipped`.
        options: arguments of PyTorch's `DataLoader`.
    """

    def __init__(self, renderer: DeviceRenderer, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.renderer, self.device = renderer, renderer.device

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # the base class returns its own iterators
        if self.device.type == "cuda":
            return self._one_ahead(super().__iter__())
        return map(self._rendered, super().__iter__())

    def _one_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which made the renderer's constants
        ready: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
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
