"""Phases are a function of the epoch, and give the published sizes, magnitudes and images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data import Augmentation, ImageDataModule, PhaseCalendar
from vitrail.data.phases import PhasedViews, with_magnitude
from vitrail.data.render import PILRenderer
from vitrail.data.sources import Digits
from vitrail.data.views import geometry
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


def phased(augment, calendar=CALENDAR, **kwargs):
    phases = PhaseCalendar(calendar, multiple=8, **kwargs).fit((32, 32), 4)
    return PhasedViews(phases, augment, SPEC, 0.5)


def rendered(views, epoch, seed=0):
    return PILRenderer(SPEC).image(photograph(), views.draw_view((90, 70), seed, epoch, 3))


@pytest.mark.parametrize("crop_last", [False, True])
def test_lanczos__resizes_the_finished_crop(crop_last):
    """The image of a phase is the full-size image with the phase's magnitude, resized."""
    augment = Augmentation(scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", crop_last=crop_last)
    full = replace(augment, auto_augment="rand-m5-mstd0.5-inc1").views(SPEC, 0.5)
    for seed in range(5):
        expected = rendered(full, 2, seed).resize((24, 24), Image.Resampling.LANCZOS)
        assert np.array_equal(rendered(phased(augment), 2, seed), expected)


@pytest.mark.parametrize("downscale", ["crop", "lanczos"])
def test_views__have_the_size_and_erasing_of_the_phase(downscale):
    made = phased(Augmentation(scale=(0.2, 1.0), erase_prob=1.0), downscale=downscale)
    for epoch, side in enumerate((16, 16, 24, 32, 32)):
        view = made.draw_view((90, 70), 0, epoch, 3)
        assert view.output == (side, side)
        assert view.crop_size == ((side, side) if downscale == "crop" else (32, 32))
        assert PILRenderer(SPEC)(photograph(), view).shape == (3, side, side)
        for top, left, height, width in view.erasing:
            assert top + height <= side
            assert left + width <= side


@pytest.mark.parametrize("augment", [
    Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.25), Augmentation(shift=0.125),
])  # fmt: skip
def test_final_phase__has_the_plain_views(augment):
    for index in range(20):
        plain = augment.views(SPEC, 0.5).draw_view((90, 70), 0, 3, index)
        assert phased(augment).draw_view((90, 70), 0, 3, index) == plain


def test_label_maps__follow_the_crop_at_every_size():
    """Label maps are cropped as a share of the image, so that the number of pixels does not matter."""
    made, full = phased(Augmentation(scale=(0.1, 1.0))), Augmentation(scale=(0.1, 1.0)).views(SPEC, 0.5)
    for epoch in (0, 2, 3):
        assert geometry(made.draw_view((90, 70), 0, epoch, 3)) == geometry(full.draw_view((90, 70), 0, epoch, 3))


def test_warning__if_there_is_no_magnitude_to_change(caplog):
    phased(Augmentation(auto_augment="3a"))
    assert "phases: augment.auto_augment=3a has no magnitude to change" in caplog.text
    caplog.clear()
    phased(Augmentation(auto_augment="rand-m9"))
    phased(Augmentation(), calendar=[{"share": 1, "image_size": 8}])
    assert not caplog.text


def test_evaluation_transform__has_no_phases():
    data = ImageDataModule(Digits(), Augmentation(enabled=False), 32)
    with pytest.raises(ConfigError, match="phases change the training augmentation"):
        data.set_phases(PhaseCalendar(CALENDAR).fit((32, 32), 4))


def digits(workers, phases=True, **kwargs):
    data = ImageDataModule(Digits(), Augmentation(), 32, batch_size=300, num_workers=workers, **kwargs)
    if phases:
        data.set_phases(PhaseCalendar(CALENDAR, multiple=8).fit((32, 32), 4))
    data.setup()
    return data


@pytest.mark.thorough
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


def test_device__renders_the_size_of_the_phase():
    """Rendered in batches, at most 1 of 255 from Pillow's pixels in each of crop and resize."""
    loader, device = digits(0).train_dataloader(), digits(0, render="device").train_dataloader()
    for epoch, side in ((0, 16), (2, 24), (3, 32)):
        loader.sampler.set_epoch(epoch)
        device.sampler.set_epoch(epoch)
        one, other = next(iter(loader)), next(iter(device))
        assert one.image.shape == other.image.shape == (300, 3, side, side)
        difference = (one.image - other.image).abs() * 0.229 * 255
        assert (difference < 2.5).all()
        assert (difference < 0.5).float().mean() > 0.99


def test_presets__are_scaled_from_224():
    names = sorted(path.stem for path in (CONF / "phases").glob("*.yaml"))
    assert names == ["efficienttrain", "efficienttrain_pp", "none"]
    for name in names[:2]:
        calendar = published(name).calendar
        assert calendar[-1]["image_size"] == 224
        assert math.isclose(sum(phase["share"] for phase in calendar), 1)
