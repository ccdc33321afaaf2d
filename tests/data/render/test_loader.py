"""Data modules give the same batches, whichever renderer makes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from photographs import photographs
from vitrail.data import Augmentation, ImageFolderDataModule
from vitrail.data.label_maps import LabelMapStore
from vitrail.errors import ConfigError

SIDE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 24 photographs of two classes as JPEG, and one grey PNG."""
    root = tmp_path_factory.mktemp("photographs")
    for number, picture in enumerate(photographs(24, largest=120)):
        path = root / ("val" if number % 4 == 3 else "train") / f"class{number % 2}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=90)
    Image.fromarray(photographs(1)[0]).convert("L").save(root / "train" / "class0" / "grey.png")
    (root / "val" / "class0").mkdir(exist_ok=True)
    Image.fromarray(photographs(1)[0]).save(root / "val" / "class0" / "x.png")
    return root


def batches(folder, render, **options):
    augment = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5, erase_mode="const")
    data = ImageFolderDataModule(
        str(folder), augment=augment, image_size=SIDE, batch_size=6, seed=3, render=render, **options
    )
    data.setup()
    return list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches__same_with_both_renderers(workers, folder):
    here, there = (batches(folder, render, num_workers=workers) for render in ("loader", "device"))
    assert len(here) == len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert one.key == other.key
        assert torch.equal(one.label, other.label)
        assert other.image.dtype == torch.float32
        difference = (one.image - other.image).abs() * 255 * 0.225
        assert (difference > 0.5).float().mean() < 0.005


def test_batches__auto_renders_in_the_loader_without_a_gpu(folder):
    here, auto = (batches(folder, render, num_workers=0) for render in ("loader", "auto"))
    assert all(torch.equal(one.image, other.image) for one, other in zip(here, auto, strict=True))


def test_batches__same_label_maps_with_both_renderers(folder, tmp_path):
    data = ImageFolderDataModule(str(folder), image_size=SIDE)
    split = data.source.open("train")
    writer = LabelMapStore.create(tmp_path / "maps", len(split), 1, (2, 2), 2, split.keys(), class_names=data.classes)
    for index, label in enumerate(split.labels):
        writer.write(index, np.full((1, 2, 2), 9.0), np.full((1, 2, 2), label))
    writer.finish()
    both = (batches(folder, render, num_workers=0, label_maps=tmp_path / "maps") for render in ("loader", "device"))
    for one, other in zip(*both, strict=True):
        for part, same in zip(one.label_map, other.label_map, strict=True):
            assert torch.equal(part, same)


def test_epochs__follow_the_sampler(folder):
    data = ImageFolderDataModule(
        str(folder), augment=Augmentation(), image_size=SIDE, batch_size=6, seed=3, render="device", num_workers=0
    )
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    first = [batch.key for batch in loader]
    loader.sampler.set_epoch(2)
    assert first != [batch.key for batch in loader]
    loader.sampler.resume(1, 6)
    assert [batch.key for batch in loader] == first[1:]


def test_render__augmentation_without_device_rendering(folder):
    augment = Augmentation(auto_augment="augmix-m5")
    data = ImageFolderDataModule(str(folder), augment=augment, image_size=SIDE, render="device")
    with pytest.raises(ConfigError, match=r"AugMix runs in the loader, so that data.render=device is not possible"):
        data.setup()
