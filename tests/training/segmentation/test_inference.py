"""Predictions for whole images: windows, padding, scales, mirroring."""

import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import ConfigError
from vitrail.training.segmentation import DenseInference
from vitrail.training.segmentation.inference import window_origins

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def inference(**options):
    return DenseInference(MEAN, STD, **{"window": (32, 32), "short_side": 32, "long_side": 128, **options})


class Pointwise:
    """A network whose logits are the colours, so that windows change nothing."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(tuple(images.shape))
        return 4 * images


@pytest.mark.parametrize(("length", "origins"), [
    (512, [0]), (683, [0, 171]), (1024, [0, 341, 512]), (2048, [0, 341, 682, 1023, 1364, 1536]), (300, [0]),
])  # fmt: skip
def test_windows__of_the_published_settings(length, origins):
    assert window_origins(length, 512, 341) == origins


def test_stride__is_two_thirds_by_default():
    assert DenseInference(MEAN, STD, (512, 512)).steps == (341, 341)
    assert inference(stride=(16, 8)).steps == (16, 8)


@pytest.mark.parametrize("options", [
    {}, {"stride": (8, 8)}, {"mode": "whole"}, {"scales": (1.0,), "flip": True}, {"window": (48, 32)},
])  # fmt: skip
@pytest.mark.parametrize("size", [(32, 50), (50, 32), (32, 32)])
def test_pointwise_network__every_setting_gives_its_scores(size, options):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    scores = inference(**options)(Pointwise(), image)
    assert torch.allclose(scores, (image / 255 * 4).softmax(0), atol=1e-5)


def test_scores__have_the_size_of_the_image_and_not_of_the_resized_one():
    network = Pointwise()
    scores = inference()(network, torch.randint(256, (3, 70, 110), dtype=torch.uint8))
    assert scores.shape == (3, 70, 110)
    assert network.shapes == [(2, 3, 32, 32)]
    assert torch.allclose(scores.sum(0), torch.ones(70, 110))


def test_overlapping_windows__are_averaged():
    """A network that counts its calls per window: pixels of two windows get the mean."""

    def numbered(windows):
        values = torch.arange(len(windows), dtype=torch.float32)[:, None, None]
        return torch.stack([values.expand(-1, 32, 32), torch.zeros(len(windows), 32, 32)], 1)

    scores = inference()(numbered, torch.zeros(3, 32, 50, dtype=torch.uint8))
    assert scores[0, 0, 0] == pytest.approx(torch.tensor([0.0, 0.0]).softmax(0)[0].item())
    assert scores[0, 0, 25] == pytest.approx(torch.tensor([0.5, 0.0]).softmax(0)[0].item())
    assert scores[0, 0, 49] == pytest.approx(torch.tensor([1.0, 0.0]).softmax(0)[0].item())


def test_scales_and_mirroring__average_probabilities():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 5, padding=2)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = inference(scales=(1.0, 2.0), flip=True, mode="whole")(conv, image)
        parts = []
        for side in (32, 64):
            view = F.interpolate(image[None] / 255, (side, side), mode="bilinear", align_corners=False)
            view = (view * 255).round() / 255
            for flip in (False, True):
                logits = conv(view.flip(-1) if flip else view)
                scores = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)[0].softmax(0)
                parts.append(scores.flip(-1) if flip else scores)
    assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-3)


def test_images_smaller_than_the_window__are_padded_and_cut():
    network = Pointwise()
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    scores = inference(window=(64, 64))(network, image)
    assert network.shapes == [(1, 3, 64, 64)]
    assert scores.shape == (3, 32, 32)
    network = Pointwise()
    inference(mode="whole", multiple=16)(network, torch.zeros(3, 32, 50, dtype=torch.uint8))
    assert network.shapes == [(1, 3, 32, 64)]


@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 2.0), "flip": True}, {"mode": "whole", "flip": True}])
@pytest.mark.parametrize("size", [(32, 50), (40, 200)])
def test_forward_passes__are_known_beforehand(size, options):
    network = Pointwise()
    setting = inference(**options)
    setting(network, torch.zeros(3, *size, dtype=torch.uint8))
    assert len(network.shapes) == setting.forward_passes(size)


def test_description__says_what_the_figures_depend_on():
    published = DenseInference(MEAN, STD, (512, 512), scales=(0.5, 1.75), flip=True)
    text = "window 512 x 512, stride 341 x 341, shorter side 512, scales 0.5, 1.75, mirrored too"
    assert published.describe() == text
    assert inference(mode="whole").describe() == "whole images, shorter side 32, single scale"


def test_gaps_between_windows__are_refused():
    with pytest.raises(ConfigError, match=r"data\.eval_stride=\[33, 32\]: larger than the window"):
        inference(stride=(33, 32))
    with pytest.raises(ConfigError, match=r"data\.eval_scales: is empty"):
        inference(scales=())
