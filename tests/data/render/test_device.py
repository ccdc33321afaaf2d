"""The device renderer gives Pillow's pixels: each operation within 1 of 255, whole pipelines almost equal."""

import os

import numpy as np
import pytest
import torch

from photographs import photographs
from vitrail.data import Augmentation
from vitrail.data.render import DeviceRenderer, PILRenderer, plan_batch, ship
from vitrail.data.render.device import normal
from vitrail.data.render.plan import BATCHED
from vitrail.data.views import TrainingViews
from vitrail.types import InputSpec, Step, View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = torch.device(os.environ.get("VITRAIL_TEST_DEVICE", "cpu"))
RENDERER = DeviceRenderer
if DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
    from vitrail.data.render import kernels
    from vitrail.data.render.gpu import GPURenderer

    RENDERER = GPURenderer
    if DEVICE.type == "cpu":
        kernels.BLOCK = 1 << 14  # each program of the interpreter takes about a millisecond
SIDE = 96
SPEC = InputSpec((SIDE, SIDE), MEAN, STD)
OPERATIONS = [
    ("autocontrast", ()),
    ("equalize", ()),
    ("invert", ()),
    ("posterize", (3,)),
    ("posterize", (0,)),
    ("solarize", (100,)),
    ("solarize", (256,)),
    ("solarize", (0,)),
    ("solarize_add", (60,)),
    ("brightness", (0.1,)),
    ("brightness", (1.7,)),
    ("contrast", (0.3,)),
    ("contrast", (1.9,)),
    ("color", (0.0,)),
    ("color", (0.4,)),
    ("color", (1.6,)),
    ("sharpness", (0.1,)),
    ("sharpness", (1.8,)),
    ("blur", (0.1,)),
    ("blur", (1.0,)),
    ("blur", (2.0,)),
    ("hflip", ()),
    ("vflip", ()),
    *[
        (name, (*values, kernel))
        for kernel in ("bilinear", "bicubic")
        for name, values in (
            ("affine", (1.0, 0.27, 0.0, 0.0, 1.0, 0.0)),
            ("affine", (1.0, 0.0, 0.0, -0.2, 1.0, 0.0)),
            ("affine", (1.0, 0.0, 33.3, 0.0, 1.0, 0.0)),
            ("affine", (1.0, 0.0, 0.0, 0.0, 1.0, -12.5)),
            ("rotate", (17.3,)),
            ("rotate", (-29.0,)),
        )
    ],
]


def difference(pictures, views, spec=SPEC, erase_mode="const", operations=(), group_size=5):
    """Return the differences of the two renderers (B, 3, H, W) in steps of 1 of 255."""
    here = PILRenderer(spec, erase_mode, operations)
    there = RENDERER(spec, DEVICE, erase_mode, operations)
    expected = torch.stack([here(picture, view) for picture, view in zip(pictures, views, strict=True)])
    shipped = [ship(picture, view, here) for picture, view in zip(pictures, views, strict=True)]
    scale = 255 * torch.tensor(STD)[:, None, None]
    return ((there(plan_batch(shipped, group_size)).cpu() - expected) * scale).abs().round()


@pytest.mark.parametrize(("name", "values"), OPERATIONS, ids=str)
def test_operation__pillows_pixels_for_the_same_input(name, values):
    """Apply each operation to images of the network's size, and to images of different sizes before the crop."""
    square = photographs(4, smallest=SIDE, largest=SIDE + 1)
    crop = Step("crop", (0, 0, SIDE, SIDE, "bicubic"))
    views = [View((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE), (crop, Step(name, values)))] * 4
    after = difference(square, views)
    assert after.max() <= 1
    assert (after > 0).float().mean() <= 0.002
    pictures, views = [picture[:SIDE, :SIDE] for picture in photographs(6, largest=SIDE + 1)], []
    for picture in pictures:
        height, width = picture.shape[:2]
        crop = Step("crop", (0, 0, min(height, 60), min(width, 60), "bicubic"))
        size = (min(height, 60), min(width, 60))
        views.append(View((height, width), size, size, (Step(name, values), crop)))
    for picture, view in zip(pictures, views, strict=True):  # the crop leaves pixels as they are
        before = difference([picture], [view], InputSpec(view.output, MEAN, STD))
        assert before.max() <= 1
        assert (before > 0).float().mean() <= 0.002


def test_operations__on_a_common_canvas():
    """Operations before the crop see only their own image, not the canvas around it."""
    pictures = photographs(12, largest=200)
    kinds = [OPERATIONS[number % len(OPERATIONS)] for number in range(0, 12 * 3, 3)]
    views = []
    for picture, (name, values) in zip(pictures, kinds, strict=True):
        crop = Step("crop", (0, 0, *picture.shape[:2], "bilinear"))
        views.append(View(picture.shape[:2], (SIDE, SIDE), (SIDE, SIDE), (Step(name, values), crop)))
    found = difference(pictures, views, group_size=12)
    assert (found > 0).float().mean() <= 0.002
    assert found.max() <= 2, "a difference of 1 before the crop may become 2 after its rounding"


def test_operations__all_are_tested():
    tested = {name for name, _ in OPERATIONS}
    assert tested | {"crop", "shift"} == BATCHED


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("flips", [(), ("hflip",), ("vflip", "hflip")])
def test_resize__pillows_coefficients(kernel, flips):
    """Crops that shrink and grow, wide and tall: Pillow resizes rows of tall crops first."""
    pictures, views, random = photographs(24, seed=1), [], np.random.default_rng(2)
    for picture in pictures:
        height, width = (int(random.integers(20, side + 1)) for side in picture.shape[:2])
        top, left = picture.shape[0] - height, picture.shape[1] - width
        crop = Step("crop", (top, left, height, width, kernel))
        views.append(View(picture.shape[:2], (SIDE, 64), (SIDE, 64), (crop, *map(Step, flips))))
    found = difference(pictures, views, InputSpec((SIDE, 64), MEAN, STD))
    assert found.max() <= 1
    assert (found > 0).float().mean() <= 0.002


def test_resize__the_finished_crop():
    augment = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5)
    views = TrainingViews(augment, (SIDE, SIDE), 0.5, output=(40, 48))
    pictures = photographs(16, seed=3)
    views = [views.draw_view(picture.shape[:2], 1, index) for index, picture in enumerate(pictures)]
    found = difference(pictures, views)
    assert found.shape[-2:] == (40, 48)
    assert (found > 0).float().mean() < 0.005


PIPELINES = {
    "deit": {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25},
    "lvvit": {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25, "crop_last": True, "interpolation": "random"},
    "deit3": {"auto_augment": "3a", "color_jitter": 0.3},
    "augreg": {"auto_augment": "rand-m15-n2", "interpolation": "bilinear", "scale": (0.05, 1.0)},
    "autoaugment": {"auto_augment": "original-mstd0.5", "vflip": 0.5, "erase_prob": 0.9, "erase_count": 3},
    "cifar": {"shift": 0.125},
}


def pipeline(name, count, side):
    spec = InputSpec((side, side), MEAN, STD)
    pictures, views = photographs(count, seed=4), Augmentation(**PIPELINES[name]).views(spec, 0.5)
    views = [views.draw_view(picture.shape[:2], 7, index) for index, picture in enumerate(pictures)]
    return torch.cat([difference(pictures[at : at + 50], views[at : at + 50], spec) for at in range(0, count, 50)])


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline__almost_all_values_are_equal(name):
    found = pipeline(name, 50, SIDE)
    assert (found == 0).float().mean() >= 0.995
    assert (found <= 1).float().mean() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline__thousand_photographs(name):
    found = pipeline(name, 1000, 224)
    assert (found == 0).float().mean() >= 0.995
    assert (found <= 1).float().mean() >= 0.999


def test_large_crops__are_rendered_in_the_loader(monkeypatch):
    monkeypatch.setattr("vitrail.data.render.shipping._MAX_PIXELS", 5000)
    for name in ("deit", "lvvit"):
        found = pipeline(name, 20, 48)
        assert (found > 0).float().mean() < 1e-3, "Pillow rendered most of them"


def test_own_operation__both_renderings():
    class Stripe:
        """Set one row to white."""

        name = "stripe"

        def draw(self, draws, size):
            return (draws.python.randrange(size[0]),) if draws.python.random() < 0.8 else None

        def render_image(self, image, values):
            image = image.copy()
            image.paste((255, 255, 255), (0, int(values[0]), image.width, int(values[0]) + 1))
            return image

        def render_batch(self, images, values):
            rows = torch.arange(images.shape[2], device=images.device) == values[:, :1]
            return torch.where(rows[:, None, :, None], 255, images)

    augment = Augmentation(auto_augment="3a", operations=[Stripe()])
    assert augment.device_problem() is None
    pictures, views = photographs(20), augment.views(SPEC, 0.5)
    views = [views.draw_view(picture.shape[:2], 0, index) for index, picture in enumerate(pictures)]
    assert 10 <= sum(view.steps[-1].name == "stripe" for view in views) < 20
    found = difference(pictures, views, operations=augment.operations)
    assert (found > 1).float().mean() < 1e-3


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing__same_boxes_and_a_content_that_depends_on_the_image(mode):
    augment = Augmentation(erase_prob=1.0, erase_count=2, erase_mode=mode)
    views = augment.views(SPEC, 0.5)
    pictures = photographs(8)
    views = [views.draw_view(picture.shape[:2], 3, index) for index, picture in enumerate(pictures)]
    here, there = PILRenderer(SPEC, mode), RENDERER(SPEC, DEVICE, mode)
    shipped = [ship(picture, view, here) for picture, view in zip(pictures, views, strict=True)]
    together, apart = there(plan_batch(shipped)).cpu(), there(plan_batch(shipped[5:6])).cpu()
    torch.testing.assert_close(together[5], apart[0], atol=0, rtol=0)
    plain = there(plan_batch([part._replace(view=part.view._replace(erasing=())) for part in shipped])).cpu()
    for index, view in enumerate(views):
        erased = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        for top, left, height, width in view.erasing:
            erased[top : top + height, left : left + width] = True
        assert torch.equal(together[index][:, ~erased], plain[index][:, ~erased])
        box = together[index][:, erased]
        assert (box == 0).all() if mode == "const" else box.std() > 0.1
    if mode == "pixel":
        assert not torch.equal(together[0, :, :5, :5], together[1, :, :5, :5])


def test_noise__normal_and_without_repetition():
    noise = normal(torch.tensor([[1, 2], [2, 1], [2**32 - 1, 0]]), torch.arange(200_000))
    assert noise.isfinite().all()
    torch.testing.assert_close(noise.mean(1), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(1), torch.ones(3), atol=0.01, rtol=0)
    torch.testing.assert_close((noise.abs() < 1).float().mean(1), torch.full((3,), 0.6827), atol=0.005, rtol=0)
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.01
    assert torch.corrcoef(torch.stack((noise[0, :-1], noise[0, 1:])))[0, 1].abs() < 0.01


def test_device_problem__is_named():
    assert Augmentation().device_problem() is None
    assert "enabled" in Augmentation(enabled=False).device_problem()
    assert "augmix-m5" in Augmentation(auto_augment="augmix-m5").device_problem()
    assert "interpolation=nearest" in Augmentation(interpolation="nearest").device_problem()
