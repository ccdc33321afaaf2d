"""What mixup and CutMix leave of each image, and token labels that follow it."""

import pytest
import torch

from vitrail.data import Mixing
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.objectives import TokenLabelingLoss
from vitrail.training import ImageClassifier
from vitrail.types import LabelMap, Sample


def mixed_batch(mixing, key=(1, 2, 3)):
    """Eight images of 16 pixels, each of its own grey and class, mixed; (images, probabilities, shares)."""
    images = torch.arange(8.0)[:, None, None, None].repeat(1, 3, 16, 16)
    shares = mixing.shares(images, key)
    images, probabilities = mixing(images, torch.arange(8), 8, key)
    return images, probabilities, shares


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_shares__say_what_happened_to_the_pixels(alphas, mode):
    mixing = Mixing(*alphas, mode=mode)
    for draw in range(10):
        images, probabilities, shares = mixed_batch(mixing, (draw,))
        own = torch.arange(8.0)[:, None, None]
        torch.testing.assert_close(images[:, 0], shares * own + (1 - shares) * own.flip(0), atol=1e-5, rtol=0)
        left = probabilities.diagonal()
        torch.testing.assert_close(shares.mean((1, 2)), left, atol=1e-6, rtol=0)


def token_targets_of(mixing, shares, probabilities, images):
    """Token targets of images that are their own class everywhere, (8, 16, 8) on a grid of 4 x 4 tokens."""
    model = create_model("deit_nano", 8, 16, dense_head=True, depth=1)
    module = ImageClassifier(model, TokenLabelingLoss(smoothing=0.0), 8, mixing=mixing)
    classes = torch.arange(8, dtype=torch.int32)[:, None, None, None].repeat(1, 1, 2, 2)
    box, flipped = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(8, 1), torch.zeros(8, dtype=torch.bool)
    maps = LabelMap(torch.full((8, 1, 2, 2), 40.0).half(), classes, box, flipped)
    return module._targets(Sample(images, probabilities, ["k"] * 8, maps, shares))


def test_token_targets__follow_the_pixels_of_cutmix():
    mixing = Mixing(0.0, 1.0, mode="elem")
    images, probabilities, shares = mixed_batch(mixing)
    targets = token_targets_of(mixing, shares, probabilities, images)
    own = targets.tokens.to_dense()[torch.arange(8), :, torch.arange(8)].unflatten(1, (4, 4))
    covered = torch.nn.functional.avg_pool2d(shares[:, None], 4)[:, 0]
    torch.testing.assert_close(own, covered, atol=1e-5, rtol=0)
    assert own.min() < 0.01, "some token lies within another image"
    assert own.max() > 0.99
    torch.testing.assert_close(targets.cls, probabilities, atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.truth, probabilities)


def test_token_targets__published_blends_all_alike():
    mixing = Mixing(0.0, 1.0, tokens="published")
    images, probabilities, shares = mixed_batch(mixing)
    tokens = token_targets_of(mixing, shares, probabilities, images).tokens.to_dense()
    torch.testing.assert_close(tokens, probabilities[:, None].expand(-1, 16, -1), atol=1e-5, rtol=0)


def test_mixing__refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"augment.mix.tokens=pixels: must be position or published"):
        Mixing(tokens="pixels")
