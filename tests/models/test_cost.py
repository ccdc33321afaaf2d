"""Parameters, multiply-accumulates and tokens, counted by hand."""

import pytest
import torch
from torch import nn

from vitrail.models import create_model
from vitrail.models.cost import count_parameters, measure_cost


@pytest.mark.parametrize(
    ("layers", "macs"),
    [
        ([nn.Flatten(), nn.Linear(3 * 4 * 6, 5)], 72 * 5),
        ([nn.Conv2d(3, 8, 3, stride=2, padding=1)], 2 * 3 * 8 * (3 * 3 * 3)),  # 2 x 3 places
        ([nn.Conv2d(3, 3, 3, padding=1, groups=3)], 4 * 6 * 3 * (3 * 3)),  # one input channel for each output
        ([nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU()], 2 * 3 * 8 * (3 * 2 * 2)),  # norm and ReLU are free
        ([nn.AdaptiveAvgPool2d(1)], 0),
    ],
    ids=("linear", "convolution", "depthwise", "norm and activation", "pooling"),
)
def test_macs__of_one_layer_for_4_x_6_pixels(layers, macs):
    assert measure_cost(nn.Sequential(*layers), (4, 6)).macs == macs


@pytest.mark.parametrize(("size", "patches"), [((32, 32), 64), ((16, 48), 48)])
def test_vit__by_hand(size, patches):
    """Patches of 4 x 4 pixels; two blocks with T = patches + 1 tokens of D channels, MLP ratio 4."""
    model = create_model("deit_nano", 10, size, depth=2, patch_size=4)
    cost = measure_cost(model, size)
    dim, tokens = model.embed_dim, patches + 1
    projections = tokens * dim * (3 * dim + dim)
    attention = 2 * tokens * tokens * dim  # queries with keys, weights with values
    mlp = 2 * tokens * dim * 4 * dim
    assert cost.macs == patches * 48 * dim + 2 * (projections + attention + mlp) + dim * 10
    assert cost.tokens == tokens
    block = (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim + 4 * dim
    positions = tokens * dim + dim  # position embedding and class token
    assert cost.parameters == 49 * dim + positions + 2 * block + 2 * dim + (dim + 1) * 10


def test_tokens__none_without_tokens():
    assert measure_cost(nn.Sequential(nn.Conv2d(3, 2, 1)), (4, 4)).tokens is None


def test_parameters__frozen_ones_count_and_running_statistics_do_not():
    """8 x 3 weights and 8 biases, and 2 x 8 of BatchNorm; its running mean, variance and counter do not count."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model[0].weight.requires_grad_(False)
    assert count_parameters(model) == 24 + 8 + 16


def test_parameters__fixed_tables_of_t2t_vit_count():
    """Position table and the random features of two performers (32 x 64) are buffers here, frozen parameters there."""
    model = create_model("t2t_vit_7", 10, 32, depth=1)
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model) == trained + 5 * 256 + 2 * 32 * 64


def test_measure__leaves_the_model_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    measure_cost(model, (4, 4))
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_measure__needs_no_memory_for_the_weights():
    """A layer of 4 TB on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1_000_000), nn.Linear(1_000_000, 1_000_000))
    assert measure_cost(model, (4, 4)).macs == 48 * 10**6 + 10**12


def test_measure__other_image_size_is_refused():
    model = create_model("vit_nano", 10, 32)
    with pytest.raises((AssertionError, RuntimeError)):
        measure_cost(model, (40, 40))
    assert model.training
