"""Measure whether token labels in pre-training help segmentation, on real images, offline: `make demo-segmentation`.

1. Train LV-ViT-nano with and without token labels on the digits of `make demo`, three seeds each; its finished runs are
   used if they are there.
2. Paste digits on photographs again, and keep their masks: ten classes of strokes, and the background.
3. Train two decoders on each backbone, with the same seeds and number of steps: a linear classifier of its frozen
   features, and UperNet with all weights. UperNet works at the resolution of the backbone (no pyramid), and the
   backbone learns with 0.03 of its learning rate, the best of 0.03, 0.1 and 0.3 for both kinds (seed 11, 15 epochs).
   With its whole learning rate the backbone forgets, and the network predicts nothing but the background.

The differences are paired: runs of one seed differ in the token labels of their pre-training only. The interval of
their mean is that of Student's t distribution. Top-1 of the pre-training is printed beside it: a backbone that has not
learned to classify yet does not transfer either, and the comparison then measures that. `make demo-segmentation
ARGS=full` avoids this with the backbones of `make demo ARGS=full`: 24 epochs, five seeds, and the same top-1 with and
without token labels.

Every step calls a program of `src/` and prints its command. Finished steps are kept, so that an interrupted demo
resumes. `--scale 0.5` halves the number of images and epochs.
"""

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from comparisons import interval, show
from demo import FEW, LONG, SEEDS, Demo, chosen_settings, parser_of_demo
from digits_on_photographs import PROJECT, SIDE, console, digit_images
from figures import write_figures
from rich.table import Table

from vitrail.reporting.segmentation import mask_image

STATED = PROJECT / "results" / "demo_segmentation.json"
"""Figures of `full`."""
CLASSES = ("background", *(str(number) for number in range(10)))
DECODERS = {
    "linear": (10, ("model=linear_segmenter", "optimizer.lr=1e-2")),
    "upernet": (
        25,
        (
            *("model=upernet", "model.pyramid=none", "model.channels=64", "model.auxiliary_channels=64"),
            *("optimizer.lr=3e-3", "optimizer.backbone_lr_scale=0.03"),
        ),
    ),
}
"""Epochs and overrides of each decoder."""
KINDS = ("labels", "neither")
TITLES = {"top1": "top-1 of the pre-training", "linear_mIoU": "mIoU, linear, frozen", "upernet_mIoU": "mIoU, UperNet"}
Scores = dict[str, list[float]]
"""mIoU or top-1 in %, by kind of pre-training; one for each seed."""
_INK = 128  # covered part of a pixel, of 255, from which it belongs to the digit


def write_masks(out: Path, scale: float) -> Path:
    """Write 600 and 200 images times `scale` with their masks, once; return their folder."""
    root = out / "masks"
    if (root / "classes.txt").is_file():
        return root
    shutil.rmtree(root, ignore_errors=True)
    counts = {"train": max(32, int(600 * scale)), "val": max(20, int(200 * scale))}
    for split, number, label, image, ink in digit_images(counts, seed=1):
        mask = np.where(np.asarray(ink) >= _INK, label + 1, 0)
        for kind, picture in (("images", image), ("masks", mask_image(mask))):
            folder = root / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:05d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


def fine_tune(demo: Demo, root: Path, backbones: str, folder: str, seeds: Sequence[int]) -> dict[str, Scores]:
    """Train both decoders on every backbone in the folder `backbones`, in `folder`; return their mIoU in %."""
    options = (
        *("experiment=segmentation", f"data.root={root}", "backbone=lvvit_nano", "trainer=cpu", "data.num_workers=0"),
        *(f"data.image_size={SIDE}", f"data.short_side={SIDE}", f"data.long_side={4 * SIDE}", "data.batch_size=16"),
        *("augment.hflip=0", "augment.ratio=[0.75,1.5]", "augment.max_class_share=1", "schedule.warmup_steps=20"),
        *("callbacks.progress=null", "trainer.gradient_clip_val=1"),
    )
    jobs = {
        f"{decoder}_{kind}_{seed}": (
            *(*options, *own, f"epochs={max(2, round(epochs * demo.scale))}", f"seed={seed}"),
            f"init_from={demo.out / backbones / f'{kind}_{seed}'}",
        )
        for seed in seeds
        for decoder, (epochs, own) in DECODERS.items()
        for kind in KINDS
    }
    found = demo.train(folder, jobs, "val/mIoU")
    return {
        f"{decoder}_mIoU": {kind: [found[f"{decoder}_{kind}_{seed}"][-1] for seed in seeds] for kind in KINDS}
        for decoder in DECODERS
    }


def report(scores: dict[str, Scores], seeds: Sequence[int]) -> dict[str, float]:
    """Print and return the scores of each seed in %, and mean and confidence interval of the paired differences."""
    table = Table(title="With token labels in the pre-training and with neither, %")
    columns = ("", "labels", *(f"seed {seed}" for seed in seeds), "mean", "95 % interval")
    for column in columns:
        table.add_column(column, justify="right")
    figures: dict[str, float] = {}
    for name, kinds in scores.items():
        differences = [a - b for a, b in zip(*(kinds[kind] for kind in KINDS), strict=True)]
        mean, half = statistics.mean(differences), interval(differences)
        for kind, values in (*kinds.items(), ("difference", differences)):
            cells = [f"{value:.2f}" for value in (*values, statistics.mean(values))]
            ends = f"{mean - half:.2f} to {mean + half:.2f}" if kind == "difference" else ""
            table.add_row(name if kind == KINDS[0] else "", kind, *cells, ends, end_section=kind == "difference")
            figures |= {f"{name}_{kind}_seed_{seed}": value for seed, value in zip(seeds, values, strict=True)}
            figures[f"{name}_{kind}_mean"] = statistics.mean(values)
        figures |= {f"{name}_difference_low": mean - half, f"{name}_difference_high": mean + half}
    console.print(table)
    return figures


def stated() -> dict[str, Scores]:
    """Return the scores in `results/demo_segmentation.json`."""
    figures = json.loads(STATED.read_text())
    return {
        name: {kind: [figures[f"{name}_{kind}_seed_{seed}"] for seed in SEEDS] for kind in KINDS} for name in TITLES
    }


def draw(scores: dict[str, Scores], path: Path) -> None:
    """Draw the scores of each seed with neither and with token labels, joined by a line; mean, standard deviation."""
    figure, axes = plt.subplots(1, len(scores), figsize=(3 * len(scores), 3.2), layout="constrained")
    for axis, (name, kinds) in zip(axes, scores.items(), strict=True):
        for number, pair in enumerate(zip(kinds["neither"], kinds["labels"], strict=True), 1):
            axis.plot((0, 1), pair, marker="o", markersize=4, linewidth=1, label=f"seed {number}")
        for place, kind in enumerate(("neither", "labels")):
            mean, spread = statistics.mean(kinds[kind]), statistics.stdev(kinds[kind])
            axis.errorbar(place + 0.12 * (2 * place - 1), mean, spread, fmt="s", color="black", capsize=4)
        axis.set(title=TITLES[name], xticks=(0, 1), xticklabels=("neither", "labels"), xlim=(-0.4, 1.4))
        axis.grid(axis="y", color="0.9")
    axes[0].set_ylabel("%")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=120)
    show("picture", path)


def main() -> None:
    """Run the demo."""
    parser = parser_of_demo(__doc__)
    parser.add_argument("extent", nargs="?", choices=("part", "full"), default="part", help="how much to train")
    options = parser.parse_args()
    demo = Demo(options.out, options.scale, options.parallel, options.gpu)
    root = write_masks(demo.out, demo.scale)
    if options.extent == "full":
        seeds, ways, backbones, folder = SEEDS, demo.ways(), f"trained_{LONG}", f"segmentation_{LONG}"
        curves = demo.compare(chosen_settings(), {kind: ways[kind] for kind in KINDS}, seeds, LONG)
    else:
        seeds, backbones, folder = FEW, "trained", "segmentation"
        curves = demo.known(seeds, KINDS)
    scores = fine_tune(demo, root, backbones, folder, seeds)
    # fine-tuning starts from the best checkpoint
    top1 = {kind: [max(accuracies) for accuracies in runs.values()] for kind, runs in curves.items()}
    scores = {"top1": top1, **scores}
    write_figures(options.json, report(scores, seeds))
    draw(scores, demo.out / f"{folder}.png")


if __name__ == "__main__":
    main()
