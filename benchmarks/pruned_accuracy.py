"""Measure what dropping tokens costs in accuracy, offline: `python benchmarks/pruned_accuracy.py`.

Each LV-ViT-nano that `make demo` trains with token labels (three seeds) is trained for a few more epochs: dense, or as
DynamicViT at keep ratios of 0.7 and 0.5 with the dense network as teacher, as published. Prints and draws top-1 of the
held-out digits against multiply-accumulates per image. Finished trainings are kept; those of `make demo` are reused.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib
from demo import (
    PROJECT,
    SEEDS,
    SIDE,
    annotate_digits,
    build_annotator,
    compare,
    console,
    curve,
    data_options,
    labelled,
    train,
    write_data,
)
from figures import add_json, write_figures
from rich.table import Table

from vitrail.models import create_model
from vitrail.models.cost import measure_cost

matplotlib.use("Agg")
RATIOS = {"dense": None, "0.7": 0.7, "0.5": 0.5}


def millions_of_macs(ratio: float | None) -> float:
    """Return the millions of multiply-accumulates for one image."""
    if ratio is None:
        model = create_model("lvvit_nano", 10, token_head=True)
    else:
        model = create_model("dynamicvit_lvvit_nano", 10, keep_ratio=ratio)
    return measure_cost(model, (SIDE, SIDE)).macs / 1e6


def draw(top1: dict[str, list[float]], macs: dict[str, float], path: Path) -> None:
    """Plot top-1 against multiply-accumulates: a dot per seed, mean and standard deviation."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in top1.items():
        axes.plot([macs[name]] * len(values), values, "o", color="0.7", zorder=1)
        axes.errorbar(macs[name], statistics.mean(values), statistics.stdev(values), fmt="o", capsize=4, color="C0")
        label = name if name == "dense" else f"keep {name}"
        axes.annotate(label, (macs[name], statistics.mean(values)), (8, -4), textcoords="offset points")
    axes.set_xlabel("multiply-accumulates per image, millions")
    axes.set_ylabel("top-1 of the held-out digits, %")
    axes.margins(x=0.15)
    axes.grid(color="0.9")
    figure.savefig(path, dpi=120)


def measure(out: Path, scale: float, epochs: int, parallel: int) -> dict[str, list[float]]:
    """Train everything; return top-1 in % after the last epoch, for each seed."""
    data = write_data(out, scale)
    annotator = build_annotator(out, data, max(2, round(5 * scale)))
    maps = annotate_digits(out, data, annotator)
    compare(out, data, {"with": labelled(maps)}, max(3, round(8 * scale)), 0.3, parallel)
    recipe = (
        *data_options(data), f"epochs={epochs}", "schedule.warmup_epochs=1", "trainer.gradient_clip_val=1",
        "augment.scale=[0.3,1.0]",
    )  # fmt: skip
    top1: dict[str, list[float]] = {name: [] for name in RATIOS}
    for seed in SEEDS:
        dense = out / f"with_{seed}"
        start = (*recipe, f"init_from={dense}", f"seed={seed}")
        pruned = (
            *start, "model=dynamicvit", "model.name=dynamicvit_lvvit_nano", "objective=dynamicvit",
            "objective.token_loss=kl", "teacher=run", f"teacher.ckpt={dense}", "optimizer.lr=1e-3",
            "optimizer.backbone_lr_scale=0.1",
        )  # fmt: skip
        for name, ratio in RATIOS.items():
            own = (
                (*start, *labelled(maps), "optimizer.lr=1e-4")
                if ratio is None
                else (*pruned, f"model.keep_ratio={ratio}")
            )
            top1[name].append(curve(train(out / "pruned" / f"{name}_{seed}", *own))[-1])
    return top1


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "logs" / "demo", help="folder of the demo")
    parser.add_argument("--scale", type=float, default=1.0, help="the demo's --scale")
    parser.add_argument("--epochs", type=int, default=4, help="further epochs of each network")
    parser.add_argument("--parallel", type=int, default=2, help="parallel trainings of dense networks")
    add_json(parser)
    options = parser.parse_args()
    out: Path = options.out.absolute()
    (out / "pruned").mkdir(parents=True, exist_ok=True)
    top1 = measure(out, options.scale, options.epochs, options.parallel)
    macs = {name: millions_of_macs(ratio) for name, ratio in RATIOS.items()}
    table = Table(title="Top-1 of the held-out digits, %")
    for name in ("keep ratio", "M MACs", *(f"seed {seed}" for seed in SEEDS), "mean", "spread"):
        table.add_column(name, justify="right")
    figures = {}
    for name, values in top1.items():
        cells = [f"{value:.1f}" for value in (macs[name], *values, statistics.mean(values), statistics.stdev(values))]
        table.add_row(name, *cells)
        figures |= {f"{name}_top1": statistics.mean(values), f"{name}_spread": statistics.stdev(values)}
        figures |= {f"{name}_seed_{seed}": value for seed, value in zip(SEEDS, values, strict=True)}
        figures[f"{name}_macs"] = macs[name]
    console.print(table)
    draw(top1, macs, out / "pruned" / "accuracy.png")
    console.print(f"picture      {out / 'pruned' / 'accuracy.png'}", soft_wrap=True, highlight=False)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
