"""Check that 20,000 draws of the training transform are distributed like timm's."""

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2_contingency
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation

from vitrail.data import Augmentation
from vitrail.data.randomness import seeded
from vitrail.types import InputSpec

pytestmark = pytest.mark.thorough

DRAWS = 20_000


def record_draws(transform, boxes, operations):
    """Record the crops and operations that a pipeline of timm's stages draws."""
    for stage in getattr(transform, "transform", transform).transforms:
        if isinstance(stage, RandomResizedCropAndInterpolation):
            get_params = stage.get_params

            def recorded(image, scale, ratio, get_params=get_params):
                boxes.append(get_params(image, scale, ratio))
                return boxes[-1]

            stage.get_params = recorded
        if isinstance(stage, RandAugment):
            for operation in stage.ops:
                # the effect of an operation is not tested here, so skip it
                operation.aug_fn = lambda image, *_, name=operation.name, **__: operations.append(name) or image
    return transform


def draw_histograms(transform, boxes, operations, seed):
    """Return histograms of crop area, crop aspect ratio, flip and operations of 20,000 draws."""
    left_dark = Image.fromarray(np.tile(np.linspace(0, 255, 16).astype(np.uint8)[None, :, None], (16, 1, 3)))
    record_draws(transform, boxes, operations)
    flips = []
    with seeded(seed):
        for _ in range(DRAWS):
            pixels = transform(left_dark)
            pixels = pixels[0] if isinstance(pixels, tuple) else pixels
            flips.append(bool(pixels[0, 0, 0] > pixels[0, 0, -1]))
    areas = np.array([height * width for _, _, height, width in boxes]) / 256
    aspects = np.array([width / height for _, _, height, width in boxes])
    return {
        "area": np.histogram(areas, np.linspace(0, 1, 9))[0],
        "aspect": np.histogram(aspects, [0, 0.8, 0.9, 1.01, 1.12, 9])[0],
        "flip": np.bincount(flips, minlength=2),
        "operations": np.array([operations.count(name) for name in sorted(set(operations))]),
    }


@pytest.fixture(scope="module")
def histograms():
    options = {"color_jitter": None, "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bilinear"}
    timms = create_transform(4, is_training=True, hflip=0.5, **options)
    augment = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bilinear")
    ours = augment.viewed(InputSpec(4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 0.5)
    return draw_histograms(ours, [], [], 1), draw_histograms(timms, [], [], 2)


@pytest.mark.parametrize("what", ["area", "aspect", "flip", "operations"])
def test_draws__distributed_like_timm(histograms, what):
    ours, timms = (histogram[what] for histogram in histograms)
    assert ours.sum() > 0.9 * DRAWS
    if what == "operations":
        assert len(ours) == len(timms) == 15
    kept = (ours + timms) > 0
    assert chi2_contingency(np.stack([ours[kept], timms[kept]])).pvalue > 1e-3
