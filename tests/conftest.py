import ctypes
import gc
import os
import random
import sys
import time
from collections import defaultdict

import numpy as np
import pytest
import torch

from vitrail_runtime import resolvers

os.environ["WANDB_MODE"] = "offline"
resolvers.register()  # for tests that compose configs themselves
torch.set_num_threads(1)  # the suite runs on as many processes as there are cores


_STARTERS = ("run", "run_python", "train", "start", "run_ranks", "start_ranks", "subprocess")


_next_trim = [0.0]


def pytest_runtest_teardown():
    """Return freed memory to the system now and then: the tests' many models would fill it with fragments."""
    if time.monotonic() > _next_trim[0]:
        _next_trim[0] = time.monotonic() + 20
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_modifyitems(items):
    """Put tests of the same finished training in the same xdist worker; mark what suites skip."""
    cases = defaultdict(list)
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("finished"))
        if any(hasattr(item.module, name) for name in _STARTERS):
            item.add_marker(pytest.mark.process)
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            cases[item.module, item.originalname].append(item)
    for group in cases.values():
        (count,) = group[0].get_closest_marker("sample").args
        chosen = {round(number) for number in np.linspace(0, len(group) - 1, count)}
        for number, item in enumerate(group):
            if number not in chosen:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Start each test with the same random numbers, whichever tests ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def image_tree(tmp_path):
    """`train/` and `val/` folders with two classes: JPEG crops of scikit-learn's two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for split, count in (("train", 8), ("val", 3)):
        for name, photograph in zip(("flower", "pagoda"), reversed(photographs), strict=True):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                box = (20 * number, 10 * number, 20 * number + 300, 10 * number + 260)
                photograph.crop(box).save(folder / f"{name}_{number}.jpg")
    return tmp_path / "images"


@pytest.fixture
def label_maps(image_tree, tmp_path):
    """Label maps of the 16 training images with the true class in every cell."""
    from vitrail.data.label_maps import LabelMapStore

    keys = sorted(str(path.relative_to(image_tree / "train").with_suffix("")) for path in image_tree.glob("train/*/*"))
    writer = LabelMapStore.create(tmp_path / "maps", len(keys), 1, (4, 4), 2, keys)
    for index, key in enumerate(keys):
        writer.write(index, np.full((1, 4, 4), 8.0), np.full((1, 4, 4), int(key.startswith("pagoda"))))
    writer.finish()
    return tmp_path / "maps"


@pytest.fixture
def maps(tmp_path):
    """Label maps of the digits with another class in each half of the map."""
    from vitrail.data.label_maps import LabelMapStore
    from vitrail.data.sources import Digits

    split = Digits().open("train")
    writer = LabelMapStore.create(tmp_path / "maps", len(split.keys()), 1, (4, 4), 10, split.keys())
    for index, label in enumerate(split.labels):
        classes = torch.full((1, 4, 4), int(label))
        classes[:, :, 2:] = (int(label) + 1) % 10
        writer.write(index, torch.full((1, 4, 4), 8.0).numpy(), classes.numpy())
    writer.finish()
    return tmp_path / "maps"
