"""Phases are a function of the epoch, and give the published sizes, magnitudes and images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from vitrail.data import Augmentation, ImageDataModule, PhaseCalendar
from vitrail.data.phases import PhasedTransforms, with_magnitude
from vitrail.data.randomness import seeded
from vitrail.data.sources import Digits
from vitrail.errors import ConfigError
from vitrail.runs.config import compose, instantiate
from vitrail.types import InputSpec
from vitrail_runtime.project import CONF

SPEC = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3)
CALENDAR = [
    {"share": 0.5, "image_size": 16, "magnitude": 1},
    {"share": 0.25, "image_size": 24, "magnitude": 5},
    {"share": 0.25, "image_size": 32},
]


def published(name):
    return instantiate(compose("train", [f"phases={name}"]).phases, "phases")


def test_efficienttrain__has_the_published_sizes_and_magnitudes():
    phases = published("efficienttrain").fit((224, 224), 300)
    sizes = [phases.at(epoch).size[0] for epoch in range(300)]
    assert sizes == [160] * 180 + [192] * 60 + [224] * 60
    assert [phases.at(epoch).magnitude for epoch in range(0, 300, 60)] == [1, 3, 5, 7, 9]
    assert phases.compute(300) / 300 == pytest.approx(0.653, abs=5e-4)
    assert phases.schedule_epochs(17.5) == 17.5


def test_efficienttrain_pp__has_ten_phases_of_equal_compute():
    """469 epochs have the compute of 200; phase i has 20 x (224 / size)^2 epochs."""
    phases = published("efficienttrain_pp").fit((224, 224), 469)
    assert [phase.size[0] for phase in phases.phases] == [96, 96, 160, 160, 160, 160, 192, 192, 224, 224]
    assert [phase.magnitude for phase in phases.phases] == list(range(10))
    for phase in phases.phases:
        assert phase.epochs == pytest.approx(20 * (224 / phase.size[0]) ** 2, abs=1)
    assert phases.compute(469) == pytest.approx(200, abs=0.5)


def test_schedule__follows_the_compute_from_start_to_end():
    """The learning rate advances equally in each phase of equal compute."""
    phases = published("efficienttrain_pp").fit((224, 224), 469)
    assert phases.schedule_epochs(0) == 0
    assert phases.schedule_epochs(469) == pytest.approx(469)
    for number, phase in enumerate(phases.phases):
        assert phases.schedule_epochs(phase.start) / 469 == pytest.approx(number / 10, abs=0.005)


def test_fit__scales_sizes_to_the_final_one():
    calendar = published("efficienttrain")
    assert calendar.fit((384, 384), 300).sizes == [(272, 272), (336, 336), (384, 384)]
    assert calendar.fit((224, 448), 300).sizes == [(160, 320), (192, 384), (224, 448)]
    calendar.multiple = 4
    assert calendar.fit((32, 32), 300).sizes == [(24, 24), (28, 28), (32, 32)]
    assert calendar.fit((28, 28), 300).sizes == [(20, 20), (24, 24), (28, 28)]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 50])
def test_fit__covers_every_epoch_and_ends_at_the_final_size(epochs):
    phases = PhaseCalendar(CALENDAR, multiple=8).fit((32, 32), epochs)
    covered = [epoch for phase in phases.phases for epoch in range(phase.start, phase.end)]
    assert covered == list(range(epochs))
    assert phases.at(epochs - 1).size == phases.at(10 * epochs).size == (32, 32)


@pytest.mark.parametrize(
    ("calendar", "message"),
    [
        ([], "phases.calendar: has no phases"),
        ([{"share": 0.5, "image_size": 16}], "phases.calendar: the shares add up to 0.5"),
        ([{"share": 1, "size": 16}], r"phases.calendar\[0\].size: no such key; use share, image_size, magnitude"),
        ([{"share": 1}], r"calendar\[0\].image_size=None: must be an integer of at least 1"),
        ([{"share": 1, "image_size": 16, "magnitude": 1.5}], r"calendar\[0\].magnitude=1.5: must be an integer"),
        ([{"share": 0, "image_size": 16}], r"calendar\[0\].share=0: must be a number above 0"),
        ([16], r"calendar=\[16\]: must be a list of mappings"),
    ],
)
def test_calendar__refuses_bad_values(calendar, message):
    with pytest.raises(ConfigError, match=message):
        PhaseCalendar(calendar)


def test_magnitude__replaces_only_the_magnitude():
    assert with_magnitude("rand-m9-mstd0.5-inc1", 3) == "rand-m3-mstd0.5-inc1"
    assert with_magnitude("rand-n2-m10-mmax10", 0) == "rand-m0-n2-mmax10"
    assert with_magnitude("rand-n2", 4) == "rand-m4-n2"
    assert with_magnitude("rand-m9", None) == "rand-m9"
    assert (with_magnitude("3a", 3), with_magnitude(None, 3)) == ("3a", None)


def photograph():
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((70, 90), Image.Resampling.BICUBIC)


def transforms(augment, calendar=CALENDAR, viewed=False, **kwargs):
    phases = PhaseCalendar(calendar, multiple=8, **kwargs).fit((32, 32), 4)
    return PhasedTransforms(phases, augment, SPEC, 0.5, viewed)


@pytest.mark.parametrize("crop_last", [False, True])
def test_lanczos__resizes_the_finished_crop(crop_last):
    """The image of a phase is the full-size image with the phase's magnitude, resized before normalisation."""
    augment = Augmentation(scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", crop_last=crop_last)
    made = transforms(augment).at(2)
    full = replace(augment, auto_augment="rand-m5-mstd0.5-inc1").training(SPEC, 0.5)
    for seed in range(5):
        with seeded(seed):
            found = made(photograph())
        with seeded(seed):
            whole = full(photograph())
        pixels = ((whole * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        expected = np.asarray(resize(Image.fromarray(pixels), [24, 24], InterpolationMode.LANCZOS))
        assert found.shape == (3, 24, 24)
        assert np.array_equal(((found * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_crop__is_rendered_at_the_size_of_the_phase():
    augment = Augmentation(scale=(0.2, 1.0), erase_prob=1.0)
    made = transforms(augment, downscale="crop")
    assert [made.at(epoch)(photograph()).shape[-1] for epoch in range(5)] == [16, 16, 24, 32, 32]
    plain = replace(SPEC, size=(24, 24))
    assert str(made.at(2)) == str(augment.training(plain, 0.5))


def test_final_phase__equals_the_plain_transform():
    augment = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.25)
    assert str(transforms(augment).at(3)) == str(augment.training(SPEC, 0.5))


@pytest.mark.parametrize("augment", [Augmentation(enabled=False), Augmentation(shift=0.125)])
def test_other_augmentations__get_the_size_of_the_phase(augment):
    assert transforms(augment).at(0)(photograph()).shape == (3, 16, 16)


def test_views__do_not_depend_on_the_size():
    """Label maps are cropped as a share of the image: the same view, whatever the size of the pixels."""
    augment = Augmentation(scale=(0.1, 1.0))
    made = transforms(augment, viewed=True)
    views = []
    for epoch in (0, 2, 3):
        with seeded(7):
            pixels, view = made.at(epoch)(photograph())
        views.append(view)
        assert pixels.shape[-1] == (16, 24, 32)[len(views) - 1]
    assert views[0] == views[1] == views[2]


def test_warning__if_there_is_no_magnitude_to_change(caplog):
    transforms(Augmentation(auto_augment="3a"))
    assert "phases: augment.auto_augment=3a has no magnitude to change" in caplog.text
    caplog.clear()
    transforms(Augmentation(auto_augment="rand-m9"))
    transforms(Augmentation(), calendar=[{"share": 1, "image_size": 8}])
    assert not caplog.text


def digits(workers, phases=True):
    data = ImageDataModule(Digits(), Augmentation(), 32, batch_size=300, num_workers=workers)
    if phases:
        data.set_phases(PhaseCalendar(CALENDAR, multiple=8).fit((32, 32), 4))
    data.setup()
    return data


def test_loader__persistent_workers_follow_the_epoch_and_the_order_stays():
    """Workers keep running and prefetch; each batch has the size of its epoch, and the plain run's images."""
    loaders = [digits(1).train_dataloader(), digits(0).train_dataloader(), digits(0, phases=False).train_dataloader()]
    for epoch, side in enumerate((16, 16, 24, 32)):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for worker, main, plain in zip(*loaders, strict=True):
            assert worker.image.shape[-2:] == (side, side)
            assert torch.equal(worker.image, main.image)
            assert worker.key == main.key == plain.key
            assert side < 32 or torch.equal(plain.image, main.image)
    assert digits(0).val_dataloader().dataset[0].image.shape == (3, 32, 32)


def test_presets__are_scaled_from_224():
    names = sorted(path.stem for path in (CONF / "phases").glob("*.yaml"))
    assert names == ["efficienttrain", "efficienttrain_pp", "none"]
    for name in names[:2]:
        calendar = published(name).calendar
        assert calendar[-1]["image_size"] == 224
        assert math.isclose(sum(phase["share"] for phase in calendar), 1)
