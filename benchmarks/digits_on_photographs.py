"""The demo's data: handwritten digits at random positions on photographs, and the convnet that annotates them.

Every step calls a program of `src/` and prints its command. Finished runs are kept, so that an interrupted program
resumes.
"""

import csv
import importlib.resources
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from vitrail.data.images import as_image
from vitrail.data.sources import Digits

PROJECT = Path(__file__).resolve().parent.parent
SIDE = 64  # height and width of an image in pixels
PHOTOGRAPHS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    *("hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
)
console = Console()


def photographs() -> dict[str, Image.Image]:
    """Return the photographs that are installed with scikit-image and scikit-learn, by name."""
    from sklearn.datasets import load_sample_images

    folder = importlib.resources.files("skimage.data")
    found = {}
    for name in PHOTOGRAPHS:
        with importlib.resources.as_file(folder / name) as path:
            found[Path(name).stem] = Image.open(path).convert("RGB")
    pictures = load_sample_images()
    return found | {
        Path(name).stem: Image.fromarray(image) for name, image in zip(pictures.filenames, pictures.images, strict=True)
    }


class DigitImage(NamedTuple):
    """An image of one digit."""

    split: str
    number: int
    label: int
    image: Image.Image
    ink: Image.Image
    """How much of each pixel the digit covers, 0 to 255."""


def digit_images(counts: dict[str, int], seed: int = 0) -> Iterator[DigitImage]:
    """Yield images of one bright digit each, at a random position on a darkened crop of a photograph.

    The digits of `train` and `val` are different images by the same writers.
    """
    backgrounds = list(photographs().values())
    random = np.random.default_rng(seed)
    for split, count in counts.items():
        digits = Digits().open(split)  # type: ignore[arg-type]
        for number in range(count):
            digit = digits[number % len(digits)]
            photograph = backgrounds[random.integers(len(backgrounds))]
            side = int(random.integers(SIDE, min(photograph.size) // 2))
            left, top = (int(random.integers(length - side)) for length in photograph.size)
            image = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
            size = int(random.integers(24, 37))
            x, y = (int(place) for place in random.integers(0, SIDE - size + 1, 2))
            image = image.point(lambda value: value // 2)
            colour = random.integers(128, 256, 3)  # brighter than any background
            stroke = as_image(digit.image).convert("L").resize((size, size), Image.Resampling.BICUBIC)
            image.paste(Image.new("RGB", (size, size), tuple(int(part) for part in colour)), (x, y), stroke)
            ink = Image.new("L", image.size)
            ink.paste(stroke, (x, y))
            yield DigitImage(split, number, int(digit.label), image, ink)


def write_digits(root: Path, counts: dict[str, int]) -> None:
    """Write the images of `digit_images` as a data set with one folder per class."""
    for split, number, label, image, _ in digit_images(counts):
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:05d}.jpg", quality=92)


def write_photographs(root: Path) -> None:
    """Write the photographs as a data set with one class."""
    for split in ("train", "val"):
        folder = root / split / "photographs"
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in photographs().items():
            image.save(folder / f"{name}.jpg", quality=92)


def write_data(out: Path, scale: float) -> Path:
    """Write the digits once: 6000 and 1000 images times `scale`; return their folder."""
    data = out / "digits"
    if not (data / "whole").is_file():
        shutil.rmtree(data, ignore_errors=True)
        write_digits(data, {"train": int(6000 * scale), "val": int(1000 * scale)})
        (data / "whole").touch()
    return data


def run(program: str, *arguments: str, log: Path, threads: int = 2) -> None:
    """Run a program of `src/` and write its output to `log`.

    Raises:
        SystemExit: the program failed.
    """
    command = ["python", f"src/{program}", *arguments]
    console.print(f"$ {shlex.join(command)}", style="dim", soft_wrap=True, highlight=False, markup=False)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "160"}
    with log.open("w") as output:
        status = subprocess.run(
            [sys.executable, *command[1:]], cwd=PROJECT, env=environment, stdout=output, stderr=output, check=False
        ).returncode
    if status:
        sys.exit(f"error: {shlex.join(command)} failed. End of {log}:\n{log.read_text()[-2000:]}")


def train(folder: Path, *arguments: str, threads: int = 2) -> Path:
    """Train in `folder`, unless the same command has already finished there; return the run directory."""
    finished, overrides = folder / "results.json", folder / "overrides.txt"
    if not finished.is_file() or overrides.read_text().splitlines() != list(arguments):
        shutil.rmtree(folder, ignore_errors=True)
        run(
            "train.py",
            *arguments,
            f"hydra.run.dir={folder}",
            log=folder.with_name(f"{folder.name}.log"),
            threads=threads,
        )
    return folder


def data_options(data: Path) -> tuple[str, ...]:
    """Return the overrides that all runs share: the digits without flips, on the CPU, no progress bar."""
    return (
        *("trainer=cpu", "data=imagefolder", f"data.root={data}", f"data.image_size={SIDE}", "data.hflip=0"),
        *("data.num_workers=0", "data.batch_size=32", "callbacks.ema=null", "callbacks.progress=null"),
    )


def curve(folder: Path, metric: str = "val/top1") -> list[float]:
    """Return a metric after each epoch, in %."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[metric]) for row in csv.DictReader(file)]


def build_annotator(out: Path, data: Path, epochs: int) -> Path:
    """Train a convnet with a receptive field of 51 pixels; return its run directory."""
    network = ("model=timm", "model.name=resnetv2_50", "+model.layers=[2,2]", "+model.channels=[96,192]")
    annotator = train(
        out / "annotator", *data_options(data), *network, "seed=0",
        f"epochs={epochs}", "schedule.warmup_epochs=1", "optimizer.lr=4e-3", "augment.scale=[0.5,1.0]",
    )  # fmt: skip
    console.print(f"annotator: {curve(annotator)[-1]:.2f} % top-1")
    return annotator


def annotate_digits(out: Path, data: Path, annotator: Path) -> Path:
    """Annotate the training digits; return the folder of their label maps."""
    maps, log = annotator / "maps", out / "annotate.log"  # retraining the annotator deletes its maps
    run(
        "annotate.py", "annotator=run", f"annotator.ckpt={annotator}", "data=imagefolder", f"data.root={data}",
        f"out={maps}", "top_k=10", "preview=10", log=log,
    )  # fmt: skip
    console.print(log.read_text().split("\n", 3)[-1], highlight=False, markup=False)
    return maps


def annotate_photographs(out: Path, pictures: Path) -> Path:
    """Annotate the photographs with EfficientNet-Lite0; return the path of the preview."""
    maps = out / "photograph_maps"
    run(
        "annotate.py", "annotator=efficientnet_lite0", "annotator.image_size=448", "data=imagefolder",
        f"data.root={pictures}", f"out={maps}", "preview=10", log=out / "photographs.log",
    )  # fmt: skip
    return maps / "preview.png"
