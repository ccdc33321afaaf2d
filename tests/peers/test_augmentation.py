"""Training and evaluation images equal those of timm's pipeline with the same draws, on 200 real photographs."""

import importlib.resources

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from programs import PROJECT
from vitrail.data import ImageFolderDataModule
from vitrail.data.images import as_image
from vitrail.data.randomness import seeded
from vitrail.data.sampling import Draw
from vitrail.runs.config import instantiate

pytestmark = pytest.mark.thorough

FILES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
# Arguments of timm's create_transform in the official commands.
PUBLISHED = {
    "deit": {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "re_prob": 0.25, "re_mode": "pixel"},
    "deit3": {"auto_augment": "3a", "color_jitter": 0.3, "interpolation": "bicubic"},
    "augreg_medium2": {"auto_augment": "rand-m15-n2", "interpolation": "bilinear", "scale": (0.05, 1.0)},
}
EVALUATION = {"deit": (0.875, "bicubic"), "deit3": (1.0, "bicubic"), "augreg_medium2": (0.875, "bilinear")}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Write 200 JPEGs with sides of 60 to 400 pixels, wide and tall, cropped from eight photographs."""
    folder = importlib.resources.files("skimage.data")
    sources = [Image.open(str(folder / name)).convert("RGB") for name in FILES]
    sources += [Image.fromarray(image) for image in load_sample_images().images]
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(200):
        source = sources[number % len(sources)]
        width, height = (int(random.integers(60, min(side, 401))) for side in source.size)
        left, top = int(random.integers(source.width - width + 1)), int(random.integers(source.height - height + 1))
        for split in ("train", "val"):
            target = root / split / str(number % 2) / f"{number:03d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            source.crop((left, top, left + width, top + height)).save(target, quality=int(random.integers(70, 96)))
    return root


def data_with(name, root):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        augment = instantiate(compose("train", [f"augment={name}"]).augment, "augment")
    data = ImageFolderDataModule(str(root), augment=augment, image_size=96, hflip=0.5, seed=4)
    data.setup()
    assert len(data.train) == len(data.val) == 200
    return data


@pytest.mark.parametrize("name", PUBLISHED)
def test_training__same_pixels_for_the_same_draws(name, photographs):
    data = data_with(name, photographs)
    options = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": None, **PUBLISHED[name]}
    timms = create_transform(96, is_training=True, **options)
    seen = []
    for index in range(200):
        with seeded(4, 2, index):
            expected = timms(as_image(data.train.split[index].image))
        seen.append(data.train[Draw(index, 2, False)].image)
        assert torch.equal(seen[-1], expected), data.train.split.keys()[index]
    assert len({image.sum().item() for image in seen}) == 200


@pytest.mark.parametrize("name", PUBLISHED)
def test_evaluation__same_pixels(name, photographs):
    data = data_with(name, photographs)
    crop_pct, interpolation = EVALUATION[name]
    timms = create_transform(96, is_training=False, crop_pct=crop_pct, interpolation=interpolation)
    for index in range(200):
        assert torch.equal(data.val[Draw(index, 0, False)].image, timms(as_image(data.val.split[index].image)))
