"""Joint augmentation: the mask follows the image exactly, and its values never mix."""

import pytest
import torch
from torchvision import tv_tensors

from vitrail.data.randomness import seeded
from vitrail.data.segmentation import JointAugmentation
from vitrail.data.segmentation.augment import fitted_size
from vitrail.types import MASK_IGNORE

PLAIN = {"photometric": 0.0, "max_class_share": 1.0, "short_side": 64, "long_side": 256}
NORMAL = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def coded(height=72, width=96):
    """Return an image whose red value is 20 times the mask's class."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[: height // 2, width // 2 :] = 3
    mask[height // 2 :, : width // 3] = 7
    mask[height // 2 :, width // 3 :] = 11
    return torch.stack([mask * 20, mask, 255 - mask]), mask


@pytest.mark.parametrize(("size", "limits", "expected"), [
    ((512, 683), (512, 2048), (512, 683)), ((683, 512), (512, 2048), (683, 512)),
    ((300, 400), (512, 2048), (512, 683)), ((100, 1000), (512, 2048), (205, 2048)),
])  # fmt: skip
def test_fitted_size__keeps_the_aspect_ratio(size, limits, expected):
    assert fitted_size(size, *limits) == expected


@pytest.mark.parametrize("seed", range(6))
def test_mask__follows_the_image(seed):
    image, mask = coded()
    with seeded(seed):
        augmented, labels = JointAugmentation(**PLAIN)(image, mask, (64, 64), *NORMAL)
    assert augmented.shape == (3, 64, 64)
    assert labels.shape == (64, 64)
    assert labels.dtype == torch.uint8
    assert type(labels) is torch.Tensor
    assert set(labels.unique().tolist()) <= {0, 3, 7, 11, MASK_IGNORE}
    seen = labels != MASK_IGNORE
    expected = labels.float() * 20 / 255
    share = ((augmented[0] - expected).abs() < 0.05)[seen].float().mean()
    assert share > 0.85  # at borders between classes, the image is interpolated


def test_padding__is_zero_after_normalisation_and_ignored():
    image, mask = coded(32, 32)
    augment = JointAugmentation(**{**PLAIN, "short_side": 32}, ratio=(1.0, 1.0), hflip=0.0)
    augmented, labels = augment(image, mask, (64, 48), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (labels[32:] == MASK_IGNORE).all()
    assert (labels[:, 32:] == MASK_IGNORE).all()
    assert torch.equal(labels[:32, :32], mask)
    assert (augmented[:, 32:] == 0).all()
    assert (augmented[:, :, 32:] == 0).all()
    assert augmented[2, 0, 0] == pytest.approx(1.0)


def test_flip__mirrors_both():
    image, mask = coded(64, 64)
    augment = JointAugmentation(**PLAIN, ratio=(1.0, 1.0), hflip=1.0)
    augmented, labels = augment(image, mask, (64, 64), *NORMAL)
    assert torch.equal(labels, mask.flip(-1))
    assert torch.equal((augmented * 255).round().byte(), image.flip(-1))


def test_crop__limits_the_share_of_one_class():
    """A class on nine tenths of the image: most crops would be all of it."""
    mask = torch.zeros(256, 256, dtype=torch.uint8)
    mask[:, 224:] = 1
    mask[:8] = MASK_IGNORE
    image = mask.expand(3, -1, -1).clone()
    options = {**PLAIN, "short_side": 256, "ratio": (1.0, 1.0)}

    def limited(share):
        with seeded(1):
            masks = [
                JointAugmentation(**{**options, "max_class_share": share})(image, mask, (64, 64), *NORMAL)[1]
                for _ in range(40)
            ]
        largest = [
            torch.bincount(part[part != MASK_IGNORE].long(), minlength=2).max() / (part != MASK_IGNORE).sum()
            for part in masks
        ]
        return sum(float(share) < 0.75 for share in largest)

    assert limited(0.75) > 2 * limited(1.0)


def test_photometric__changes_the_image_only_and_keeps_the_channels():
    image, mask = coded()
    image[0], image[1], image[2] = 200, 100, 50
    augment = JointAugmentation(**{**PLAIN, "photometric": 1.0}, saturation=(1, 1), hue=0.0, ratio=(1.0, 1.0), hflip=0)
    for seed in range(8):
        with seeded(seed):
            augmented, labels = augment(image, mask, (64, 64), *NORMAL)
        red, green, blue = augmented[:, 5, 5]
        assert red >= green >= blue  # torchvision's RandomPhotometricDistort also permutes the channels
        assert set(labels.unique().tolist()) <= {0, 3, 7, 11}
    hue = JointAugmentation(**{**PLAIN, "photometric": 1.0}, brightness=0, contrast=(1, 1), saturation=(1, 1))
    with seeded(0):
        shifted = hue(image, mask, (64, 64), *NORMAL)[0]
    assert shifted[:, 5, 5].max() == pytest.approx(200 / 255, abs=0.02)


def test_draws__depend_on_the_seed_only():
    image, mask = coded()
    results = []
    for seed in (3, 3, 4):
        with seeded(seed):
            results.append(JointAugmentation(short_side=64, long_side=256)(image, mask, (64, 64), *NORMAL))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_masks__are_resized_to_the_nearest_value():
    from vitrail.data.segmentation.augment import resized

    mask = tv_tensors.Mask(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert set(resized(mask, (2, 8)).unique().tolist()) == {0, 255}
