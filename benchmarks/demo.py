"""Measure whether token labels help, on real images, offline: `make demo`.

1. Paste handwritten digits at random positions on crops of photographs, and save them as JPEGs of 64 x 64 pixels.
2. Train a small convnet on them, and annotate them with it: 8 x 8 cells per image.
3. Train LV-ViT-nano with and without token labels: the same three seeds, the same number of epochs, crops of 30 to
   100 % of the image.
4. Annotate the photographs themselves with EfficientNet-Lite0 and its ImageNet weights.

`--compare teacher` compares another pair in step 3: DeiT-nano with a distillation token, trained with the convnet as
teacher or with the labels only, on crops of 60 to 100 %. `--compare features` compares three: LV-ViT-nano with the
convnet's features as targets of its patch tokens, with token labels, and with neither.

Every step calls a program of `src/` and prints its command. Finished steps are kept, so that an interrupted demo
resumes. `--scale 0.5` halves the number of images and epochs.
"""

import argparse
import csv
import importlib.resources
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import add_json, write_figures
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from vitrail.data.images import as_image
from vitrail.data.sources import Digits

PROJECT = Path(__file__).resolve().parent.parent
SIDE = 64  # height and width of an image in pixels
SEEDS = (1, 2, 3)
PHOTOGRAPHS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    *("hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
)
PLAIN = ("model=lvvit_nano", "objective=cross_entropy")  # without token labels
COLOURS = {
    "with": (0, 110, 200),
    "without": (220, 90, 0),
    "features": (0, 140, 70),
    "labels": (0, 110, 200),
    "neither": (220, 90, 0),
}
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


def labelled(maps: Path) -> tuple[str, ...]:
    """Return the overrides of LV-ViT-nano with token labels."""
    return ("model=lvvit_nano", "model.token_head=true", "objective=token_labeling", f"data.label_maps={maps}")


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
        run("train.py", *arguments, f"hydra.run.dir={folder}", log=folder.with_suffix(".log"), threads=threads)
    return folder


def data_options(data: Path) -> tuple[str, ...]:
    """Return the overrides that all trainings share: the digits without flips, on the CPU, no progress bar."""
    return (
        *("trainer=cpu", "data=imagefolder", f"data.root={data}", f"data.image_size={SIDE}", "data.hflip=0"),
        *("data.num_workers=0", "data.batch_size=32", "callbacks.ema=null", "callbacks.progress=null"),
    )


def curve(folder: Path, metric: str = "val/top1") -> list[float]:
    """Return a metric after each epoch, in %."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[metric]) for row in csv.DictReader(file)]


def draw_curves(curves: dict[str, list[list[float]]], what: str, path: Path) -> None:
    """Plot accuracy against epochs of each kind of training: a thin line per run, a thick one for the mean."""
    width, height, left, bottom = 720, 420, 60, 40
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    epochs = len(next(iter(curves.values()))[0])
    lowest = 10 * int(min(min(run) for runs in curves.values() for run in runs) // 10)

    def place(epoch: int, accuracy: float) -> tuple[float, float]:
        share = (accuracy - lowest) / (100 - lowest)
        return left + epoch / epochs * (width - left - 20), height - bottom - share * (height - bottom - 20)

    for accuracy in range(lowest, 101, 10):
        draw.line((place(0, accuracy), place(epochs, accuracy)), fill=(225, 225, 225))
        draw.text((place(0, accuracy)[0] - 42, place(0, accuracy)[1] - 8), f"{accuracy} %", "black", font)
    for epoch in range(1, epochs + 1, max(1, epochs // 10)):
        draw.text((place(epoch, lowest)[0] - 5, height - bottom + 6), str(epoch), "black", font)
    draw.text((width // 2 - 20, height - 20), "epoch", "black", font)
    for number, (name, runs) in enumerate(curves.items()):
        pale = tuple(255 - (255 - part) // 3 for part in COLOURS[name])
        for accuracies in runs:
            draw.line([place(epoch + 1, value) for epoch, value in enumerate(accuracies)], fill=pale, width=1)
        mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
        draw.line([place(epoch + 1, value) for epoch, value in enumerate(mean)], fill=COLOURS[name], width=3)
        legend = f"{name} {what}".strip()
        draw.text((left + 20, 24 + 18 * number), f"{legend}, mean of {len(runs)}", COLOURS[name], font)
    sheet.save(path)


def report(curves: dict[str, list[list[float]]], what: str) -> dict[str, float]:
    """Print and return the final accuracy of each seed and kind, the differences to the last kind, mean and spread."""
    table = Table(title="Top-1 of the held-out digits after the last epoch, %")
    for name in (what, *(f"seed {seed}" for seed in SEEDS), "mean", "spread"):
        table.add_column(name, justify="right")
    final = {name: [accuracies[-1] for accuracies in runs] for name, runs in curves.items()}
    *others, last = final
    for name in others:
        differences = [a - b for a, b in zip(final[name], final[last], strict=True)]
        final["difference" if len(others) == 1 else f"{name}_difference"] = differences
    for name, values in final.items():
        cells = [f"{value:.2f}" for value in (*values, statistics.mean(values), statistics.stdev(values))]
        table.add_row(name, *cells)
    console.print(table)
    return {
        **{
            f"{name}_seed_{seed}": value
            for name, values in final.items()
            for seed, value in zip(SEEDS, values, strict=True)
        },
        **{f"{name}_mean": statistics.mean(values) for name, values in final.items()},
        **{f"{name}_spread": statistics.stdev(values) for name, values in final.items()},
    }


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


def recipe(epochs: int, smallest: float) -> tuple[str, ...]:
    """Return the overrides of a training on crops of `smallest` to 1 of the image."""
    return (
        *(f"epochs={epochs}", "schedule.warmup_epochs=2", "optimizer.lr=1e-3"),
        *("trainer.gradient_clip_val=1", f"augment.scale=[{smallest},1.0]"),
    )


def compare(
    out: Path, data: Path, kinds: dict[str, tuple[str, ...]], epochs: int, smallest: float, parallel: int
) -> dict[str, list[list[float]]]:
    """Train all kinds on crops of `smallest` to 1 of the image; return top-1 after each epoch, for each seed."""
    options = (*data_options(data), *recipe(epochs, smallest))
    jobs = [(name, seed) for seed in SEEDS for name in kinds]
    with ThreadPoolExecutor(parallel) as pool:
        runs = [
            pool.submit(train, out / f"{kind}_{seed}", *options, *kinds[kind], f"seed={seed}", threads=1)
            for kind, seed in jobs
        ]
        curves = [curve(run.result()) for run in runs]
    return {name: [run for (kind, _), run in zip(jobs, curves, strict=True) if kind == name] for name in kinds}


def compare_labels(out: Path, data: Path, maps: Path, scale: float, parallel: int) -> dict[str, list[list[float]]]:
    """Train LV-ViT-nano with and without token labels in `out`; return top-1 after each epoch, for each seed."""
    kinds = {"with": labelled(maps), "without": PLAIN}
    # A crop may miss the digit, as published crops miss the object: the image's label is then wrong, the map is not.
    return compare(out, data, kinds, max(3, round(8 * scale)), 0.3, parallel)


def annotate_photographs(out: Path, pictures: Path) -> Path:
    """Annotate the photographs with EfficientNet-Lite0; return the path of the preview."""
    maps = out / "photograph_maps"
    run(
        "annotate.py", "annotator=efficientnet_lite0", "annotator.image_size=448", "data=imagefolder",
        f"data.root={pictures}", f"out={maps}", "preview=10", log=out / "photographs.log",
    )  # fmt: skip
    return maps / "preview.png"


def parser_of_demo(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the demos share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "logs" / "demo", help="output folder")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of images and epochs")
    parser.add_argument("--parallel", type=int, default=2, help="parallel trainings, one core each")
    add_json(parser)
    return parser


def main() -> None:
    """Run the demo."""
    parser = parser_of_demo(__doc__)
    parser.add_argument(
        "--compare", choices=("labels", "teacher", "features"), default="labels", help="what to compare"
    )
    options = parser.parse_args()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    data, pictures = write_data(out, options.scale), out / "photographs"
    if not pictures.is_dir():
        write_photographs(pictures)

    console.print("[bold]1. Train a small convnet on the digits, and annotate them")
    annotator = build_annotator(out, data, max(2, round(5 * options.scale)))
    if options.compare == "teacher":
        console.print("[bold]2. Train DeiT-nano with and without the convnet as teacher")
        student = ("model=vit", "model.name=deit_nano_distilled", "model.patch_size=8")
        learn = ("objective=distillation", "teacher=run", f"teacher.ckpt={annotator}")
        kinds = {"with": (*student, *learn), "without": (*student, "objective=cross_entropy")}
        (out / "teacher").mkdir(exist_ok=True)
        curves = compare(out / "teacher", data, kinds, max(3, round(10 * options.scale)), 0.6, options.parallel)
        write_figures(options.json, report(curves, "teacher"))
        draw_curves(curves, "teacher", out / "teacher" / "curves.png")
        return
    maps = annotate_digits(out, data, annotator)
    if options.compare == "features":
        console.print("[bold]2. Train LV-ViT-nano with the convnet's features, with token labels, and with neither")
        taught = ("model=lvvit_nano", "objective=feature_distillation", "teacher=run", f"teacher.ckpt={annotator}")
        (out / "features").mkdir(exist_ok=True)
        kinds = {"features": taught, "labels": labelled(maps), "neither": PLAIN}
        curves = compare(out / "features", data, kinds, max(3, round(8 * options.scale)), 0.3, options.parallel)
        write_figures(options.json, report(curves, ""))
        draw_curves(curves, "", out / "features" / "curves.png")
        return
    console.print("[bold]2. Train LV-ViT-nano with and without token labels")
    curves = compare_labels(out, data, maps, options.scale, options.parallel)
    write_figures(options.json, report(curves, "token labels"))
    draw_curves(curves, "token labels", out / "curves.png")
    console.print("[bold]3. Annotate the photographs with EfficientNet-Lite0")
    overlays = annotate_photographs(out, pictures)
    for name, path in (
        ("curves", out / "curves.png"),
        ("digits", maps / "preview.png"),
        ("photographs", overlays),
    ):
        console.print(f"{name:<12} {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
