"""Batches on their way to a device, and the seeds of a step."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from timm.data import create_transform

from photographs import photographs
from vitrail.data import Augmentation
from vitrail.data.randomness import reseed
from vitrail.types import Batch, InputSpec, LabelMap


@pytest.mark.parametrize("has_maps", [False, True])
def test_batch__lightning_moves_all_tensors_and_keeps_the_rest(has_maps):
    maps = LabelMap(*(torch.zeros(2, number + 1) for number in range(4))) if has_maps else None
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2), ["a", "b"], maps)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.key is batch.key
    assert [part.device.type for part in (moved.image, moved.label, *(moved.label_map or ()))] == ["meta"] * (
        6 if has_maps else 2
    )
    if has_maps:
        assert [part.shape for part in moved.label_map] == [part.shape for part in maps]


def test_reseed__draws_what_manual_seed_would():
    seed = int(np.random.SeedSequence((1, 2, 3)).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(seed)
    expected = torch.rand(5)
    reseed(1, 2, 3)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_evaluation__is_timms_transform_bit_for_bit(mode, size):
    spec = InputSpec(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mine = Augmentation(crop_pct=0.9, crop_mode=mode).evaluation(spec)
    timms = create_transform(
        size, is_training=False, interpolation="bicubic", mean=spec.mean, std=spec.std, crop_pct=0.9, crop_mode=mode
    )
    for pixels in photographs(6):
        image = Image.fromarray(pixels)
        assert torch.equal(mine(image), timms(image))
