"""Views are those that timm's own transform takes under the same seed: crops, flips, operations, jitter and erasing."""

from functools import partial
from itertools import chain

import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from vitrail.data import Augmentation
from vitrail.data.randomness import seeded
from vitrail.data.views import rotation
from vitrail.types import InputSpec

SIDE = 8  # of the network's input: small, so that timm's pixels cost little
SIZE = (375, 500)
SPEC = InputSpec((SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CASES = {
    # name: (number of views, our arguments, timm's arguments)
    "deit": (
        20_000,
        {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25},
        {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25},
    ),
    "deit3": (
        4_000,
        {"auto_augment": "3a", "color_jitter": 0.3, "vflip": 0.1},
        {"auto_augment": "3a", "color_jitter": 0.3, "vflip": 0.1},
    ),
    "random kernels": (
        4_000,
        {"auto_augment": "rand-m10-n3-mstd101", "interpolation": "random", "erase_prob": 0.5},
        {"auto_augment": "rand-m10-n3-mstd101", "interpolation": "random", "re_prob": 0.5},
    ),
    "weighted": (
        2_000,
        {"auto_augment": "rand-m15-n2-mmax20-tweights", "scale": (0.05, 1.0)},
        {"auto_augment": "rand-m15-n2-mmax20-tweights", "scale": (0.05, 1.0)},
    ),
    "3-augment with weights": (2_000, {"auto_augment": "rand-m9-n3-t3aw"}, {"auto_augment": "rand-m9-n3-t3aw"}),
    "autoaugment": (2_000, {"auto_augment": "original-mstd0.5"}, {"auto_augment": "original-mstd0.5"}),
    "autoaugment v0": (2_000, {"auto_augment": "v0r"}, {"auto_augment": "v0r"}),
}
VALUES = ("posterize", "solarize", "solarize_add", "brightness", "contrast", "color", "sharpness", "blur")
FACTORS = ("brightness", "contrast", "color", "sharpness")


class Recorder:
    """Records what timm's transform does, as (name, values)."""

    def __init__(self, monkeypatch):
        self.events = []
        patch = partial(monkeypatch.setattr, raising=True)
        patch("timm.data.transforms.F.resized_crop", self.crop)
        for name in ("hflip", "vflip"):
            patch(f"torchvision.transforms.functional.{name}", self.after(name, getattr(tv, name)))
        for method, name in (("brightness", "brightness"), ("contrast", "contrast"), ("saturation", "color")):
            function = f"adjust_{method}"
            patch(f"torchvision.transforms.functional.{function}", self.after(name, getattr(tv, function)))
        patch("PIL.Image.Image.transform", lambda *values, **options: self.transform(*values, **options))
        patch("PIL.Image.Image.rotate", lambda *values, **options: self.rotate(*values, **options))
        patch("PIL.ImageFilter.GaussianBlur", self.blur)

    def crop(self, image, top, left, height, width, size, kernel):
        self.events.append(("crop", (top, left, height, width, kernel.value)))
        return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)

    def after(self, name, function):
        def recorded(image, *values):
            self.events.append((name, values))
            return function(image, *values)

        return recorded

    def transform(self, image, size, method, data, resample, fillcolor):
        assert fillcolor == (124, 116, 104)
        self.events.append(("affine", (*map(float, data), Image.Resampling(resample).name.lower())))
        return image

    def rotate(self, image, degrees, resample, fillcolor):
        self.events.append(("affine", (*rotation(degrees, (SIDE, SIDE)), Image.Resampling(resample).name.lower())))
        return image

    def blur(self, radius):
        self.events.append(("blur", (radius,)))
        return ImageFilter.BoxBlur(0)

    def wrap(self, operation):
        """Record an operation of timm's policy that has no random kernel."""
        apply, name = operation.aug_fn, operation.name
        if name.startswith(("Rotate", "Shear", "Translate", "Gaussian")):
            return

        def recorded(image, *values, **options):
            kind = OURS[name]
            if kind == "color" and name == "Desaturate":
                values = (min(1.0, max(0.0, 1.0 - values[0])),)
            if not (kind == "posterize" and values[0] >= 8):
                self.events.append((kind, values))
            # recent versions of Pillow cannot posterize to 0 bits
            return image if kind == "posterize" else apply(image, *values, **options)

        operation.aug_fn = recorded

    def erase(self, stage, pixels):
        """Run random erasing on ones, and record its box."""
        empty = stage(torch.ones_like(pixels))[0] == 0
        if empty.any():
            rows, columns = empty.any(1).nonzero(), empty.any(0).nonzero()
            top, left = int(rows[0]), int(columns[0])
            self.events.append(("erase", (top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)))
        return pixels


OURS = {
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Posterize": "posterize",
    "PosterizeIncreasing": "posterize",
    "PosterizeOriginal": "posterize",
    "Solarize": "solarize",
    "SolarizeIncreasing": "solarize",
    "SolarizeAdd": "solarize_add",
    "Desaturate": "color",
    **{
        f"{name}{end}": name.lower()
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
        for end in ("", "Increasing")
    },
}


def events_of(view):
    """Return a view's steps and erased boxes in the recorder's form."""
    events = []
    for name, values in view.steps:
        if name == "rotate":
            events.append(("affine", (*rotation(values[0], (SIDE, SIDE)), values[1])))
        else:
            events.append((name, values))
    return events + [("erase", tuple(box)) for box in view.erasing if box.height and box.width]


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(3)
def test_draw_view__timms_draws(name, monkeypatch):
    count, ours, timms = CASES[name]
    options = {"interpolation": "bicubic", "color_jitter": None, "hflip": 0.5, "re_mode": "const", **timms}
    recorder = Recorder(monkeypatch)
    transform = create_transform(SIDE, is_training=True, **options)
    for number, stage in enumerate(transform.transforms):
        for operation in [*getattr(stage, "ops", ()), *chain(*getattr(stage, "policy", ()))]:
            recorder.wrap(operation)
        if isinstance(stage, RandomErasing):
            transform.transforms[number] = partial(recorder.erase, stage)
    views = Augmentation(**ours).views(SPEC, 0.5)
    image = Image.new("RGB", SIZE[::-1], (90, 120, 60))
    kinds = set()
    for index in range(count):
        recorder.events.clear()
        with seeded(5, 1, index):
            transform(image)
        found = events_of(views.draw_view(SIZE, 5, 1, index))
        assert found == recorder.events, index
        kinds |= {kind for kind, _ in found}
    assert len(kinds) >= {"deit": 14, "deit3": 8}.get(name, 5), sorted(kinds)


def test_draw_view__global_generators_stay_as_they_are():
    views = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5).views(SPEC, 0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    view = views.draw_view(SIZE, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert view == views.draw_view(SIZE, 0, 1) != views.draw_view(SIZE, 0, 2)
