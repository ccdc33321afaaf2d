"""Folders of JPEGs cut from scikit-image's photographs, for benchmarks that read files."""

import importlib.resources
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")


def write_images(
    root: Path, count: int, val_count: int = 2, size: tuple[int, int] = (500, 375), classes: int = 2
) -> None:
    """Write JPEGs into `root/train/<class>` and `root/val/<class>`; those of 500 x 375 pixels have about 70 KB.

    Args:
        root: folder.
        count: number of training images.
        val_count: number of validation images.
        size: (width, height) of the images, 4 to 3, in pixels.
        classes: number of classes, which take turns.
    """
    folder, random = importlib.resources.files("skimage.data"), np.random.default_rng(0)
    sources = [Image.open(str(folder / name)).convert("RGB") for name in PHOTOGRAPHS]
    for split, number in (("train", count), ("val", val_count)):
        for index in range(number):
            source = sources[index % len(sources)]
            width = int(random.integers(min(400, source.width * 3 // 4), source.width + 1))
            height = min(source.height, width * 3 // 4)
            left, top = (int(random.integers(side + 1)) for side in (source.width - width, source.height - height))
            cut = source.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
            path = root / split / str(index % classes) / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cut.save(path, quality=92)
