"""Mixing: pixels, labels and token labels follow the same draw."""

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup

from vitrail.data import MixToken, MixupCutMix
from vitrail.data.randomness import seeded
from vitrail.errors import ConfigError
from vitrail.objectives import TokenLabelingLoss
from vitrail.training import TargetBuilder
from vitrail.types import Batch, LabelMap

SHAPE = torch.Size((8, 3, 16, 16))
MODES = pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
ALPHAS = pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])


def mixed_batch(mixing, key=(1, 2, 3)):
    """Return a mixed batch of 8 images of 16 pixels: image i is grey i, and its label map has class i in every cell."""
    images = torch.arange(8.0)[:, None, None, None].repeat(1, 3, 16, 16)
    classes = torch.arange(8, dtype=torch.int32)[:, None, None, None].repeat(1, 1, 2, 2)
    box, flipped = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(8, 1), torch.zeros(8, dtype=torch.bool)
    maps = LabelMap(torch.full((8, 1, 2, 2), 40.0).half(), classes, box, flipped)
    mix = mixing.for_batch(SHAPE, (4, 4), key)
    return Batch(mix.images(images), torch.arange(8), ["k"] * 8, maps, mix)


def own_share(batch):
    """Return the share of each pixel's own image, computed from the greys, (8, 16, 16)."""
    own = torch.arange(8.0)[:, None, None]
    return (batch.image[:, 0] - own.flip(0)) / (own - own.flip(0))


@MODES
@ALPHAS
def test_pixels_and_labels__equal_timm_exactly(alphas, mode):
    mixing = MixupCutMix(*alphas, mode=mode)
    peer = Mixup(*alphas, mode=mode, label_smoothing=0.0, num_classes=8)
    for draw in range(20):
        images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(draw))
        with seeded(draw):
            expected = peer(images.clone(), torch.arange(8))
        mix = mixing.for_batch(SHAPE, None, (draw,))
        found = mix.images(images.clone()), mix.probabilities(torch.eye(8))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


@MODES
@ALPHAS
def test_token_shares__equal_the_shares_of_their_pixels(alphas, mode):
    mixing = MixupCutMix(*alphas, mode=mode)
    for draw in range(10):
        batch = mixed_batch(mixing, (draw,))
        covered = F.avg_pool2d(own_share(batch)[:, None], 4)[:, 0].flatten(1)
        torch.testing.assert_close(batch.mix.token_shares(8, (4, 4)), covered, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.mix.probabilities(torch.eye(8)).diagonal(), covered.mean(1), atol=1e-6, rtol=0)


def test_no_mixing__for_one_image_or_zero_prob():
    assert MixupCutMix().for_batch(torch.Size((1, 3, 4, 4)), None, (0,)) is None
    assert MixupCutMix(prob=0.0).for_batch(SHAPE, None, (0,)) is None
    kept = MixupCutMix(prob=0.0, mode="elem").for_batch(SHAPE, None, (0,))
    torch.testing.assert_close(kept.probabilities(torch.eye(8)), torch.eye(8))


def test_token_targets__follow_the_pixels_of_cutmix():
    batch = mixed_batch(MixupCutMix(0.0, 1.0, mode="elem"))
    targets = TargetBuilder(smoothing=0.0)(batch, TokenLabelingLoss(), 8, (4, 4))
    own = targets.tokens.to_dense()[torch.arange(8), :, torch.arange(8)].unflatten(1, (4, 4))
    covered = F.avg_pool2d(own_share(batch)[:, None], 4)[:, 0]
    torch.testing.assert_close(own, covered, atol=1e-5, rtol=0)
    assert own.min() < 0.01, "at least one token shows only the other image"
    assert own.max() > 0.99
    torch.testing.assert_close(targets.cls, batch.mix.probabilities(torch.eye(8)), atol=1e-5, rtol=0)


def test_token_targets__published_uses_one_share_for_all():
    batch = mixed_batch(MixupCutMix(0.0, 1.0, tokens="published"))
    tokens = TargetBuilder(smoothing=0.0)(batch, TokenLabelingLoss(), 8, (4, 4)).tokens.to_dense()
    probabilities = batch.mix.probabilities(torch.eye(8))
    torch.testing.assert_close(tokens, probabilities[:, None].expand(-1, 16, -1), atol=1e-5, rtol=0)


def test_mixtoken__mixes_only_the_class_target():
    mixing = MixToken()
    key = next((1, step) for step in range(99) if mixing.for_batch(SHAPE, (4, 4), (1, step)).share < 1)
    batch = mixed_batch(mixing, key)
    targets = TargetBuilder(smoothing=0.0)(batch, TokenLabelingLoss(), 8, (4, 4))
    top, left, bottom, right = batch.mix.token_box.tolist()
    share = 1 - (bottom - top) * (right - left) / 16
    assert 0 < share < 1
    expected = share * torch.eye(8) + (1 - share) * torch.eye(8).flip(0)
    torch.testing.assert_close(targets.cls, expected, atol=1e-5, rtol=0)
    own = torch.eye(8)[:, None].expand(-1, 16, -1)
    torch.testing.assert_close(targets.tokens.to_dense(), own, atol=1e-5, rtol=0)
    assert torch.equal(batch.image[:, 0, 0, 0], torch.arange(8.0))


def test_mixing__unknown_choice():
    with pytest.raises(ConfigError, match=r"tokens=pixels: must be one of position, published"):
        MixupCutMix(tokens="pixels")
