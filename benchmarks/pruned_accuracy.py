"""Measure what dropping tokens costs in accuracy, offline: `python benchmarks/pruned_accuracy.py`.

Each LV-ViT-nano that `make demo` trains with token labels (three seeds) is trained for a few more epochs: dense, or as
DynamicViT at keep ratios of 0.7 and 0.5 with the dense network as teacher, as published. Prints and draws top-1 of the
held-out digits against multiply-accumulates per image. Finished runs are kept; those of `make demo` are reused.
"""

import statistics
from pathlib import Path

import matplotlib
from comparisons import show
from demo import FEW as SEEDS
from demo import Demo, parser_of_demo
from digits_on_photographs import SIDE, console
from figures import write_figures
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


def job(demo: Demo, ratio: float | None, seed: int, epochs: int) -> tuple[str, ...]:
    """Return the overrides of a further training of the demo's network of this seed, dense or as DynamicViT."""
    dense = demo.out / "trained" / f"labels_{seed}"
    start = (
        *(*demo.shared, "augment.scale=[0.3,1.0]", f"init_from={dense}", f"seed={seed}"),
        *(f"epochs={epochs}", "schedule.warmup_epochs=1"),
    )
    if ratio is None:
        return (*start, *demo.labelled, "optimizer.lr=1e-4")
    return (
        *(*start, "model=dynamicvit", "model.name=dynamicvit_lvvit_nano", f"model.keep_ratio={ratio}"),
        *("objective=dynamicvit", "objective.token_loss=kl", "teacher=run", f"teacher.ckpt={dense}"),
        *("optimizer.lr=1e-3", "optimizer.backbone_lr_scale=0.1"),
    )


def train_pruned(demo: Demo, epochs: int, seeds: tuple[int, ...] = SEEDS) -> dict[str, list[float]]:
    """Train everything of these seeds in out/pruned/<ratio>_<seed>; return top-1 in % after the last epoch."""
    demo.known(seeds, ("labels",))
    jobs = {f"{name}_{seed}": job(demo, ratio, seed, epochs) for seed in seeds for name, ratio in RATIOS.items()}
    curves = demo.train("pruned", jobs)
    return {name: [curves[f"{name}_{seed}"][-1] for seed in seeds] for name in RATIOS}


def main() -> None:
    """Run the measurement."""
    parser = parser_of_demo(__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="further epochs of each network")
    options = parser.parse_args()
    top1 = train_pruned(Demo(options.out, options.scale, options.parallel, options.gpu), options.epochs)
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
    picture = options.out / "pruned" / "accuracy.png"
    draw(top1, macs, picture)
    show("picture", picture)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
