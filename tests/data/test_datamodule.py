import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data import Augmentation, ImageDataModule, ImageFolderDataModule, ImageNetDataModule, MixupCutMix
from vitrail.data.dataset import ViewDataset, collate
from vitrail.data.randomness import seeded
from vitrail.data.sampling import Draw
from vitrail.data.sources import ArraySplit, Digits
from vitrail.errors import ConfigError, ImageError
from vitrail.types import IGNORE, InputSpec, Sample

UNDECODABLE = os.fsdecode(b"flower_1\xe9.jpg")


def digits(**kwargs):
    defaults = {"augment": Augmentation(scale=(0.6, 1.0)), "image_size": 16, "batch_size": 8, "num_workers": 0}
    data = ImageDataModule(Digits(), **{**defaults, **kwargs})
    data.setup()
    return data


def test_batches__shapes_and_statistics():
    data = digits(augment=Augmentation(enabled=False), mean=(0.5,) * 3, std=(0.25,) * 3)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (8, 3, 16, 16)
    assert batch.image.dtype == torch.float32
    assert batch.image.min() == -2
    assert 1.5 < batch.image.max() <= 2
    assert batch.label.dtype == torch.int64
    assert len(batch.key) == 8
    assert all(key.startswith("digits/train/") for key in batch.key)


def test_views__depend_only_on_seed_epoch_and_index():
    """Pixels are the same with 0 and 2 workers and in any order, but differ between epochs and between seeds."""
    first, second = digits(), digits(num_workers=2)
    for one, two, _ in zip(first.train_dataloader(), second.train_dataloader(), range(3), strict=False):
        torch.testing.assert_close(one.image, two.image, rtol=0, atol=0)
    view = first.train[Draw(5, 0, False)].image
    assert torch.equal(view, second.train[Draw(5, 0, False)].image)
    assert not torch.equal(view, first.train[Draw(5, 1, False)].image)
    assert not torch.equal(view, digits(seed=1).train[Draw(5, 0, False)].image)


def test_batches__have_the_pixels_of_single_items():
    data = digits(seed=0)
    draws = [Draw(index, 0, False) for index in range(4)]
    batch = collate(data.train.__getitems__(draws))
    assert torch.equal(batch.image, torch.stack([data.train[draw].image for draw in draws]))


def test_padding__has_the_ignored_label():
    data = digits()
    assert data.val[Draw(3, 0, True)].label == IGNORE
    assert data.val[Draw(3, 0, False)].label == int(data.val.split.labels[3])


def test_seeded__restores_the_generators():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(1, 2):
        inside = random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    with seeded(1, 2):
        assert (random.random(), np.random.rand(), torch.rand(1)) == inside
    with seeded(2, 1):
        assert random.random() != inside[0]


def test_corrupt_image__stop_or_skip(image_tree, tmp_path):
    (image_tree / "train" / "flower" / "flower_2.jpg").write_text("no image")
    (image_tree / "val" / "flower" / "flower_1.jpg").rename(image_tree / "val" / "flower" / UNDECODABLE)
    (image_tree / "val" / "flower" / UNDECODABLE).write_text("no image")
    data = ImageFolderDataModule(str(image_tree), image_size=32)
    data.setup()
    with pytest.raises(ImageError, match=r"flower_2.jpg"):
        data.train[Draw(2, 0, False)]
    skipped = tmp_path / "skipped.txt"
    data = ImageFolderDataModule(str(image_tree), image_size=32, on_corrupt="skip", skipped_file=skipped)
    data.setup()
    assert data.train[Draw(2, 0, False)].key == "flower/flower_3"
    assert data.val[Draw(1, 0, False)].label == IGNORE
    assert [line.split(":")[0].rpartition("/")[2] for line in skipped.read_text().splitlines()] == [
        *("flower_2.jpg", r"flower_1\xe9.jpg")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_corrupt": "ignore"}, "on_corrupt=ignore: must be one of stop, skip"),
        ({"on_corrupt": "skip"}, "data.skipped_file"),
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
    ],
)
def test_datamodule__invalid_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        digits(**arguments)


def test_imagenet__other_folders_are_an_error(image_tree):
    with pytest.raises(ConfigError, match="2 class folders are not the 1000"):
        ImageNetDataModule(str(image_tree))


def test_mixing__equals_timm_for_the_same_draws():
    from timm.data import Mixup

    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    for mode in ("batch", "pair", "elem"):
        timms = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, label_smoothing=0.0, num_classes=7)
        for step in range(8):
            with seeded(0, step, 0):
                expected = timms(images.clone(), labels)
            mix = MixupCutMix(0.8, 1.0, mode=mode).for_batch(images.shape, None, (0, step, 0))
            mixed = mix.images(images.clone()), mix.probabilities(torch.eye(7)[labels])
            torch.testing.assert_close(mixed, expected, rtol=0, atol=0)


def test_mixing__different_draws_for_each_rank_and_step():
    mixes = [MixupCutMix().for_batch(torch.Size((4, 3, 8, 8)), None, key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0))]
    targets = [mix.probabilities(torch.eye(4)) for mix in mixes]
    assert len({tuple(target.flatten().tolist()) for target in targets}) == 3
    for target in targets:
        torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_mixing__invalid_arguments():
    with pytest.raises(ConfigError, match=r"mixing: mixup and cutmix are both 0"):
        MixupCutMix(0, 0)
    with pytest.raises(ConfigError, match=r"mode=pairs: must be one of batch"):
        MixupCutMix(mode="pairs")


class ModesSplit:
    """Images of a source that returns them as Pillow opens them: 16-bit grey, palette, transparent, and RGB."""

    labels = np.array([0, 1, 0, 1])

    def __init__(self):
        grey = np.tile(np.arange(0, 256, 8, dtype=np.uint16), (32, 1))
        rgb = Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, 2))
        self.images = [Image.fromarray(grey * 257), rgb.convert("L"), rgb.convert("RGBA"), rgb]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Sample(self.images[index], int(self.labels[index]), str(index))

    def keys(self):
        return list("0123")


def test_images_of_own_sources__any_mode_is_converted_to_rgb():
    transform = Augmentation(crop_pct=1.0).evaluation(InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3))
    dataset = ViewDataset(ModesSplit(), transform, None)
    for index in range(3):
        torch.testing.assert_close(dataset[index].image, dataset[3].image)


def test_arrays__must_be_bytes():
    with pytest.raises(ConfigError, match="images of mine are float64; scale them to uint8"):
        ArraySplit("mine", np.zeros((2, 8, 8)), np.zeros(2, np.int64))
