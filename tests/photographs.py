"""Real photographs for tests."""

import importlib.resources

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs(count, seed=0, smallest=60, largest=401):
    """Return `count` cuts of eight photographs, wide and tall, as arrays (H, W, 3)."""
    folder = importlib.resources.files("skimage.data")
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
    sources = [np.asarray(Image.open(str(folder / name)).convert("RGB")) for name in names]
    sources += load_sample_images().images
    random, cuts = np.random.default_rng(seed), []
    for number in range(count):
        source = sources[number % len(sources)]
        height, width = (int(random.integers(smallest, min(side, largest))) for side in source.shape[:2])
        top, left = (
            int(random.integers(side - cut + 1)) for side, cut in zip(source.shape, (height, width), strict=False)
        )
        cuts.append(np.ascontiguousarray(source[top : top + height, left : left + width]))
    return cuts
