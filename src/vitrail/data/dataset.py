"""Datasets of transformed images, and how their items become batches."""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, default_collate

from vitrail.data.augment import Transform
from vitrail.data.images import as_image, size_of, to_rgb
from vitrail.data.label_maps import LabelMapJoin
from vitrail.data.phases import PhasedViews
from vitrail.data.render import PILRenderer, Rendered, Shipped, finish_batch, plan_batch, ship
from vitrail.data.sampling import Draw
from vitrail.data.sources import Split
from vitrail.data.views import TrainingViews, geometry
from vitrail.errors import ImageError
from vitrail.types import IGNORE, Batch, Item, LabelMap


class TrainingTransform(NamedTuple):
    """How to view and render training images."""

    views: TrainingViews | PhasedViews
    renderer: PILRenderer
    on_device: bool = False
    """Whether the training device renders, so that a sample only has what it needs."""
    warps: bool = True
    """Whether label maps follow rotations, shears and translations."""


class ViewDataset(Dataset[Item]):
    """Dataset of a split's images after a transform.

    The index is a `Draw` of the sampler, or an integer. For an integer, the view of the image is random.

    Args:
        split: images and labels.
        transform: a deterministic transform from Pillow's image to a tensor; or how to view and render training images.
        seed: seed of the views; None for a deterministic transform.
        skipped: file that lists unreadable images, which are replaced by the next readable image; None stops at the
            first unreadable image.
        fill: whether the replacement of an unreadable image counts (training) or is ignored (validation).
        maps: label maps, cropped and flipped like the image.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform | TrainingTransform,
        seed: int | None,
        skipped: Path | None = None,
        fill: bool = True,
        maps: LabelMapJoin | None = None,
    ) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self.skipped, self.fill, self.maps = skipped, fill, maps

    def __len__(self) -> int:
        return len(self.split)

    def rendered_here(self) -> "ViewDataset":
        """Return the same data set with images that are ready for the network, even if the training device renders."""
        here = copy(self)
        if isinstance(self.transform, TrainingTransform):
            here.transform = self.transform._replace(on_device=False)
        return here

    def __getitem__(self, draw: Draw | int) -> Item:
        item = self._item(draw)
        return item._replace(image=finish_batch([item.image])[0]) if isinstance(item.image, Rendered) else item

    def __getitems__(self, draws: Sequence[Draw | int]) -> list[Item]:
        """Return the items of a batch for `collate`, which normalises images straight into the batch."""
        return [self._item(draw) for draw in draws]

    def _item(self, draw: Draw | int) -> Item:
        if isinstance(draw, int):
            if not -len(self) <= draw < len(self):
                raise IndexError(f"image {draw} of {len(self)}.")
            # PyTorch's generator, which a loader seeds anew in each worker and epoch, in place of an epoch.
            epoch = 0 if self.seed is None else int(torch.randint(2**31, ()))
            draw = Draw(draw % len(self), epoch, False)
        index = draw.sample
        for _ in range(len(self.split)):
            try:
                item = self._view(index, draw)
            except ImageError as error:
                if self.skipped is None:
                    raise
                with self.skipped.open("a", encoding="utf-8") as file:  # one short append: safe between workers
                    file.write(f"{error}\n")
                index = (index + 1) % len(self.split)
                draw = draw._replace(padding=draw.padding or not self.fill)
                continue
            return item._replace(label=IGNORE) if draw.padding else item
        raise ImageError(f"data.on_corrupt=skip: no image of the split can be read, see {self.skipped}.")

    def _view(self, index: int, draw: Draw) -> Item:
        sample = self.split[index]
        picture = to_rgb(sample.image, getattr(self.split, "value_range", "type"))  # sources may return any mode
        if not isinstance(self.transform, TrainingTransform):
            return Item(self.transform(as_image(picture)), sample.label, sample.key)
        size = size_of(picture)
        view = self.transform.views.draw_view(size, self.seed or 0, draw.epoch, draw.sample, draw.repeat)
        renderer = self.transform.renderer
        image = (
            ship(picture, view, renderer)
            if self.transform.on_device
            else Rendered(renderer.image(picture, view), view, renderer)
        )
        label_map = None
        if self.maps is not None:
            label_map = self.maps(index, sample.label, geometry(view, self.transform.warps), (size[1], size[0]))
        return Item(image, sample.label, sample.key, label_map, view)


_JOIN: dict[type, Callable[[list[Any]], Any]] = {Shipped: plan_batch, Rendered: finish_batch}


def collate(items: list[Item]) -> Batch:
    """Join items into a batch.

    Args:
        items: what `ViewDataset.__getitems__` returns, or its single items.

    Returns:
        The batch; its image is a `RenderPlan` if the device renders.
    """
    images, labels, keys, maps, _ = zip(*items, strict=True)
    label_map = (
        None if maps[0] is None else LabelMap(*(default_collate(list(parts)) for parts in zip(*maps, strict=True)))
    )
    image = _JOIN.get(type(images[0]), default_collate)(list(images))
    return Batch(image, torch.tensor(labels), list(keys), label_map)
