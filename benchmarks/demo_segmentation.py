"""Measure whether token labels in pre-training help segmentation, on real images, offline: `make demo-segmentation`.

1. Train LV-ViT-nano with and without token labels on the digits of `make demo`, three seeds each; its finished runs are
   used if they are there.
2. Paste digits on photographs again, and keep their masks: ten classes of strokes, and the background.
3. Train two decoders on each backbone, with the same seeds and number of steps: a linear classifier of its frozen
   features, and UperNet with all weights.

The differences are paired: runs of one seed differ in the token labels of their pre-training only. The interval of
their mean is that of Student's t distribution. Top-1 of the pre-training is printed beside it: a backbone that has not
learned to classify yet does not transfer either, and the comparison then measures that.

Every step calls a program of `src/` and prints its command. Finished steps are kept, so that an interrupted demo
resumes. `--scale 0.5` halves the number of images and epochs.
"""

import math
import shutil
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import demo
import matplotlib.pyplot as plt
import numpy as np
from figures import write_figures
from rich.table import Table
from scipy.stats import t as student

from vitrail.reporting.segmentation import mask_image

CLASSES = ("background", *(str(number) for number in range(10)))
DECODERS = {
    "linear": ("model=linear_segmenter", "optimizer.lr=1e-2"),
    "upernet": ("model=upernet", "model.channels=32", "model.auxiliary_channels=32", "optimizer.lr=1e-3"),
}
KINDS = ("with", "without")
_INK = 128  # covered part of a pixel, of 255, from which it belongs to the digit
_CONFIDENCE = 0.95


def write_masks(out: Path, scale: float) -> Path:
    """Write 600 and 200 images times `scale` with their masks, once; return their folder."""
    root = out / "masks"
    if (root / "classes.txt").is_file():
        return root
    shutil.rmtree(root, ignore_errors=True)
    counts = {"train": max(32, int(600 * scale)), "val": max(20, int(200 * scale))}
    for split, number, label, image, ink in demo.digit_images(counts, seed=1):
        mask = np.where(np.asarray(ink) >= _INK, label + 1, 0)
        for kind, picture in (("images", image), ("masks", mask_image(mask))):
            folder = root / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:05d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


def fine_tune(out: Path, root: Path, epochs: int, parallel: int) -> dict[str, dict[str, list[float]]]:
    """Train both decoders on every backbone of `out`; return mIoU in % by decoder, kind and seed."""
    options = (
        *("experiment=segmentation", f"data.root={root}", "backbone=lvvit_nano", "trainer=cpu", "data.num_workers=0"),
        *(f"data.image_size={demo.SIDE}", f"data.short_side={demo.SIDE}", f"data.long_side={4 * demo.SIDE}"),
        *("data.batch_size=16", "augment.hflip=0", "augment.ratio=[0.75,1.5]", "augment.max_class_share=1"),
        *(f"epochs={epochs}", "schedule.warmup_steps=20", "callbacks.progress=null", "trainer.gradient_clip_val=1"),
    )
    jobs = [(name, kind, seed) for seed in demo.SEEDS for name in DECODERS for kind in KINDS]
    with ThreadPoolExecutor(parallel) as pool:
        runs = [
            pool.submit(
                demo.train,
                out / f"{name}_{kind}_{seed}",
                *(*options, *DECODERS[name], f"init_from={out / f'{kind}_{seed}'}", f"seed={seed}"),
                threads=1,
            )
            for name, kind, seed in jobs
        ]
        found = [demo.curve(run.result(), "val/mIoU")[-1] for run in runs]
    scores: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in DECODERS}
    for (name, kind, _), score in zip(jobs, found, strict=True):
        scores[name][kind].append(score)
    return scores


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the confidence interval of the mean of some values."""
    mean = statistics.mean(values)
    half = student.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def report(scores: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Print and return the scores of each seed in %, and mean and confidence interval of the paired differences."""
    table = Table(title="With and without token labels in the pre-training, %")
    columns = ("", "labels", *(f"seed {seed}" for seed in demo.SEEDS), "mean", f"{_CONFIDENCE:.0%} interval")
    for column in columns:
        table.add_column(column, justify="right")
    figures: dict[str, float] = {}
    for name, kinds in scores.items():
        differences = [a - b for a, b in zip(*(kinds[kind] for kind in KINDS), strict=True)]
        low, high = interval(differences)
        for kind, values in (*kinds.items(), ("difference", differences)):
            cells = [f"{value:.2f}" for value in (*values, statistics.mean(values))]
            ends = f"{low:.2f} to {high:.2f}" if kind == "difference" else ""
            table.add_row(name if kind == KINDS[0] else "", kind, *cells, ends, end_section=kind == "difference")
            figures |= {f"{name}_{kind}_seed_{seed}": value for seed, value in zip(demo.SEEDS, values, strict=True)}
            figures[f"{name}_{kind}_mean"] = statistics.mean(values)
        figures |= {f"{name}_difference_low": low, f"{name}_difference_high": high}
    demo.console.print(table)
    return figures


def draw(scores: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the scores of each seed without and with token labels, joined by a line."""
    figure, axes = plt.subplots(1, len(scores), figsize=(3 * len(scores), 3.2), layout="constrained")
    for axis, (name, kinds) in zip(axes, scores.items(), strict=True):
        for seed, pair in zip(demo.SEEDS, zip(kinds["without"], kinds["with"], strict=True), strict=True):
            axis.plot((0, 1), pair, marker="o", label=f"seed {seed}")
        axis.set(title=name, xticks=(0, 1), xticklabels=("without", "with"), xlim=(-0.3, 1.3))
    axes[0].set_ylabel("%")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the demo."""
    options = demo.parser_of_demo(__doc__).parse_args()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    demo.console.print("[bold]1. Train LV-ViT-nano with and without token labels, unless `make demo` has done so")
    data = demo.write_data(out, options.scale)
    annotator = demo.build_annotator(out, data, max(2, round(5 * options.scale)))
    maps = demo.annotate_digits(out, data, annotator)
    curves = demo.compare_labels(out, data, maps, options.scale, options.parallel)
    demo.console.print("[bold]2. Train a linear classifier of the features, and UperNet, on digits with masks")
    root = write_masks(out, options.scale)
    scores = fine_tune(out, root, max(2, round(10 * options.scale)), options.parallel)
    top1 = {kind: [max(accuracies) for accuracies in runs] for kind, runs in curves.items()}  # of the best checkpoint
    scores = {"top1": top1} | {f"{name}_mIoU": kinds for name, kinds in scores.items()}
    write_figures(options.json, report(scores))
    draw(scores, out / "segmentation.png")
    demo.console.print(f"picture {out / 'segmentation.png'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
