"""A small data set of images with masks: rectangles of a class's colour on noise."""

import numpy as np
from PIL import Image

CLASSES = ("ground", "[red]", "green", "blue")


def draw(seed, height=72, width=96):
    """Return an image (height, width, 3) and its mask of values 0 (not labelled) to 4 (class + 1)."""
    generator = np.random.default_rng(seed)
    image = generator.integers(60, 120, (height, width, 3), dtype=np.uint8)
    mask = np.ones((height, width), np.uint8)
    for number in range(3):
        top, left = generator.integers(0, height - 24), generator.integers(0, width - 24)
        box = slice(top, top + 24), slice(left, left + 24)
        image[box], mask[box] = 30, number + 2
        image[(*box, number)] = 220
    mask[:4] = 0
    return image, mask


def write_folder(root, counts=(("train", 8), ("val", 3)), **sizes):
    """Write images/{train,val}, masks/{train,val} (values 0 to 4) and classes.txt below `root`; return it."""
    for split, count in counts:
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image, mask = draw(1000 * (split == "val") + number, **sizes)
            Image.fromarray(image).save(root / "images" / split / f"picture_{number}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"picture_{number}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


SMALL = (
    *("experiment=segmentation", "backbone=lvvit_nano", "data.source.shift=-1", "data.image_size=64", "trainer=cpu"),
    *("data.short_side=64", "data.long_side=256", "data.batch_size=2", "data.num_workers=0", "model.channels=16"),
    *("model.auxiliary_channels=16", "model.drop_path_rate=0.1", "callbacks.model_summary=null", "epochs=2"),
    *("optimizer.lr=1e-3", "schedule.warmup_steps=2", "callbacks.progress=null"),
)
"""Options of a training of 2 epochs with 4 steps each on such a folder."""
