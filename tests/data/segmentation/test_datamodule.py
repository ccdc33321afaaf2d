"""The data module: batches, order, unusable images."""

from contextlib import nullcontext

import pytest
import torch
from PIL import Image

import masked
from vitrail.data import Augmentation
from vitrail.data.segmentation import JointAugmentation, SegmentationDataModule, SegmentationFolder
from vitrail.data.segmentation.checks import check_pairs, class_pixels
from vitrail.data.segmentation.datamodule import PassSampler
from vitrail.errors import ConfigError, ImageError
from vitrail.types import MASK_IGNORE


@pytest.fixture
def root(tmp_path):
    return masked.write_folder(tmp_path / "data", (("train", 5), ("val", 3)))


def build(root, **options):
    source = SegmentationFolder(str(root), "classes.txt", shift=-1)
    small = {"image_size": 64, "short_side": 64, "long_side": 256, "batch_size": 2, "num_workers": 0}
    return SegmentationDataModule(source, **{**small, **options})


def opened(root, **options):
    data = build(root, **options)
    data.setup()
    return data


def test_training_batches__are_normalised_crops_with_masks(root):
    data = opened(root)
    (first, second) = list(data.train_dataloader())
    assert first.image.shape == (2, 3, 64, 64)
    assert first.image.dtype == torch.float32
    assert first.label.shape == (2, 64, 64)
    assert first.label.dtype == torch.uint8
    assert set(first.label.unique().tolist()) <= {0, 1, 2, 3, MASK_IGNORE}
    assert len({*first.key, *second.key}) == 4


def test_validation_batches__are_whole_images_in_their_size(root):
    data = opened(root)
    batches = list(data.val_dataloader())
    assert [batch.key for batch in batches] == [["picture_0"], ["picture_1"], ["picture_2"]]
    assert batches[0].image.shape == (1, 3, 72, 96)
    assert batches[0].image.dtype == torch.uint8
    assert torch.equal(batches[0].label[0], torch.from_numpy(data.source.open("val")[0].mask))


def write_mask(root, name, value, size=(96, 72)):
    Image.new("L", size, value).save(root / "masks" / name)


@pytest.mark.parametrize(("checked", "found"), [(32, False), (None, True)])
def test_all_masks__are_checked_before_the_training(tmp_path, checked, found):
    root = masked.write_folder(tmp_path / "data", (("train", 70), ("val", 3)))
    write_mask(root, "train/picture_1.png", 9)
    with pytest.raises(ImageError, match=r"^[^:]*picture_1\.png: has the value 9") if found else nullcontext():
        opened(root, checked_images=checked)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("L", (96, 72), 9), "has the value 9, which is no class"),
        (Image.new("I;16", (96, 72), 300), "has the value 300, which is no class"),
        (Image.new("L", (96, 72), 0), "no pixel is labelled"),
        (Image.new("L", (96, 71), 1), "is 71 x 96 pixels, its image picture_2.png 72 x 96"),
        (Image.new("RGB", (96, 72), (1, 2, 3)), "stores colours, not classes"),
        (Image.new("LA", (96, 72)), "is stored as LA"),
    ],
)
def test_unusable_mask__is_one_sentence_before_the_training(root, mask, reason):
    mask.save(root / "masks" / "val" / "picture_2.png")
    with pytest.raises(ImageError) as caught:
        opened(root)
    assert str(caught.value).startswith(f"{root / 'masks' / 'val' / 'picture_2.png'}: {reason}")


def test_several_unusable_masks__are_counted(root):
    for index in (1, 3, 4):
        write_mask(root, f"train/picture_{index}.png", 9)
    with pytest.raises(ImageError, match=r"^3 of 5 checked masks cannot be used, the first: .*picture_1\.png: has"):
        opened(root)


def test_masks_of_0_and_255__are_not_one_class(root):
    """Most editors write masks of two classes so; 255 would count as not labelled."""
    (root / "classes.txt").write_text("background\nobject\n")
    for split in ("train", "val"):
        for path in (root / "masks" / split).iterdir():
            mask = Image.new("L", (96, 72), 0)
            mask.paste(255, (10, 10, 40, 40))
            mask.save(path)
    options = {"image_size": 64, "num_workers": 0}
    wrong = SegmentationDataModule(SegmentationFolder(str(root), "classes.txt"), **options)
    with pytest.raises(ConfigError, match=r"only the class background .* set 'data\.source\.map=\{0:0,255:1\}'\.$"):
        wrong.setup()
    right = SegmentationDataModule(SegmentationFolder(str(root), "classes.txt", map={0: 0, 255: 1}), **options)
    right.setup()
    assert set(right.val[0].label.unique().tolist()) == {0, 1}


def test_masks_of_one_class__the_advice_fits_the_options(root):
    for path in (root / "masks" / "train").iterdir():
        Image.new("L", (96, 72), 1).save(path)
        mask = Image.open(path)
        mask.paste(0, (10, 10, 40, 40))
        mask.save(path)
    with pytest.raises(ConfigError, match=r"^data\.source: all training masks have only the class ground\.$"):
        build(root).setup()


def test_classes_without_a_training_mask__are_a_warning(root, caplog):
    (root / "classes.txt").write_text("ground\nred\ngreen\nblue\npurple\nwhite\n")
    opened(root)
    assert "2 of 6 classes occur in no training mask: purple, white" in caplog.text


def test_source_without_check__is_read(root):
    class Split:
        def __init__(self, split):
            self.split = split

        def __len__(self):
            return len(self.split)

        def __getitem__(self, index):
            return self.split[index]

        def keys(self):
            return self.split.keys()

    write_mask(root, "train/picture_1.png", 9)
    assert len(check_pairs(Split(build(root).source.open("train")), range(5)).errors) == 1


@pytest.mark.parametrize("orientation", [1, 3])
def test_turned_images__are_a_warning(root, orientation, caplog):
    image = root / "images" / "train" / "picture_0.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(image).convert("RGB").save(image, exif=exif)
    opened(root)
    warning = "train: 1 of 5 checked images are turned by their EXIF orientation, the first is picture_0"
    assert (warning in caplog.text) == (orientation != 1)


def test_masks_of_padding_samples__are_ignored(root):
    data = opened(root)
    from vitrail.data.sampling import Draw
    from vitrail.data.segmentation.datamodule import collate

    batch = collate(data.val.__getitems__([Draw(0, 0, True)]))
    assert (batch.label == MASK_IGNORE).all()
    assert batch.label.shape == (1, 72, 96)


def test_crops__depend_on_seed_pass_and_image_only(root):
    first, second = (list(opened(root).train_dataloader()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.label, other.label)
    assert not torch.equal(first[0].image, next(iter(opened(root, seed=1).train_dataloader())).image)


def test_epochs_of_batches__go_on_in_the_pass(root):
    data = opened(root, batches_per_epoch=4)
    loader = data.train_dataloader()
    assert len(loader) == 4
    keys = [key for epoch in range(3) for key in _keys(loader, epoch)]
    assert len(keys) == 24
    for start in range(0, 20, 5):
        assert len(set(keys[start : start + 5])) == 5  # every pass has every image once


def _keys(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [key for batch in loader for key in batch.key]


@pytest.mark.parametrize("world", [1, 2])
def test_pass_sampler__same_order_on_any_number_of_processes_and_resumes(world):
    def draws(rank, done=0, epoch=3):
        sampler = PassSampler(7, 0, rank, world, 4 // world, 5)
        sampler.resume(epoch, done)
        return [(draw.sample, draw.epoch) for draw in sampler]

    whole = [None] * 20
    for rank in range(world):
        whole[rank::world] = draws(rank)
    single = PassSampler(7, 0, 0, 1, 4, 5)
    single.set_epoch(3)
    assert whole == [(draw.sample, draw.epoch) for draw in single]
    assert draws(0, done=6) == draws(0)[6:]
    assert len(set(whole)) == 20  # no image twice in the same view


def test_unusable_images__stop_before_the_training_or_are_skipped_and_listed(root, tmp_path):
    write_mask(root, "train/picture_0.png", 0)
    write_mask(root, "train/picture_1.png", 9)
    with pytest.raises(ImageError, match=r"2 of 5 .*picture_0\.png: no pixel is labelled"):
        build(root).setup()
    data = opened(root, on_corrupt="skip", skipped_file=tmp_path / "skipped.txt")
    keys = {key for batch in data.train_dataloader() for key in batch.key}
    assert keys <= {"picture_2", "picture_3", "picture_4"}
    list(data.train_dataloader())
    lines = (tmp_path / "skipped.txt").read_text()
    assert "picture_1.png: has the value 9" in lines


def test_skipped_validation_images__are_not_counted_twice(root, tmp_path):
    write_mask(root, "val/picture_1.png", 9)
    data = opened(root, on_corrupt="skip", skipped_file=tmp_path / "skipped.txt")
    counted = [(batch.label != MASK_IGNORE).any().item() for batch in data.val_dataloader()]
    assert counted == [True, False, True]


def test_class_pixels__counts_and_collects_errors(root):
    write_mask(root, "train/picture_1.png", 9)
    counts, errors = class_pixels(build(root).source.open("train"), range(5), 4)
    assert counts.sum() == 4 * 72 * 96
    assert counts[-1] == 4 * 4 * 96
    assert len(errors) == 1


def test_wrong_options__name_their_key(root):
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 on 1 devices is more than the 5 training images"):
        opened(root, batch_size=8).train_dataloader()
    with pytest.raises(ConfigError, match="augment: does not support masks; set augment=segmentation"):
        build(root, augment=Augmentation())
    assert build(root, augment=JointAugmentation(hflip=0)).joint.hflip == 0
