"""Deletion and insertion curves of a network whose important pixels are known."""

import pytest
import torch
from torch import nn

from vitrail.reporting.faithfulness import Curves, perturbation_curves


class Corner(nn.Module):
    """Gives class 1 the mean of the top left quarter of an image as logit, and class 0 zero."""

    def forward(self, images):
        logit = 8 * images[:, :, :4, :4].mean((1, 2, 3)) - 4
        return torch.stack((torch.zeros_like(logit), logit), 1)


def areas(importance):
    images = torch.ones(2, 3, 8, 8)
    images[1] *= 0.9
    curves = perturbation_curves(Corner(), images, importance.expand(2, -1, -1), torch.ones(2, dtype=torch.long), 16)
    assert curves.deletion.shape == (2, 17)
    assert curves.deletion[0, 0] == curves.insertion[0, -1] == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item())
    assert curves.deletion[0, -1] == pytest.approx(torch.sigmoid(torch.tensor(-4.0)).item())
    return [area[0].item() for area in curves.areas()]


def test_curves__a_faithful_map_has_a_small_deletion_area():
    faithful, wrong = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    faithful[0, 0, 0], wrong[0, 0, 0] = 1, 0
    good, bad = areas(faithful), areas(wrong)
    assert good[0] < 0.2 < 0.8 < bad[0]


def test_curves__insertion_starts_from_the_blurred_image():
    """A bright corner in a dark image: blurred it is dark, and it comes back first with a faithful map."""
    images = torch.zeros(1, 3, 8, 8)
    images[:, :, :4, :4] = 1
    faithful = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    one = torch.ones(1, dtype=torch.long)
    good = perturbation_curves(Corner(), images, faithful, one, 16)
    bad = perturbation_curves(Corner(), images, 1 - faithful, one, 16)
    assert good.insertion[0, 0] < 0.5 < good.insertion[0, -1]
    assert good.areas()[1] > bad.areas()[1] + 0.3


def test_areas__by_hand():
    deletion, insertion = Curves(torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])).areas()
    assert (deletion.item(), insertion.item()) == (0.5, 0.25)
