"""Fixtures of the tests of trainings."""

import pytest
import torch

from vitrail.data.label_maps import LabelMapStore
from vitrail.data.sources import Digits


@pytest.fixture
def maps(tmp_path):
    """Label maps of the digits with another class in each half of the map."""
    split = Digits().open("train")
    writer = LabelMapStore.create(tmp_path / "maps", len(split.keys()), 1, (4, 4), 10, split.keys())
    for index, label in enumerate(split.labels):
        classes = torch.full((1, 4, 4), int(label))
        classes[:, :, 2:] = (int(label) + 1) % 10
        writer.write(index, torch.full((1, 4, 4), 8.0).numpy(), classes.numpy())
    writer.finish()
    return tmp_path / "maps"
