"""Compare whole runs with either renderer, offline: `python benchmarks/renderers.py`.

ViT-nano learns the embedded digits with RandAugment, in several orders (and augmentations) of the images; each order
once with Pillow in the loader, and once with the device's renderer. The initial weights are the same. A difference of 1
of 255 in a few pixels grows over the steps, as another order does: the renderers should differ no more than orders do.

Figures: `loader_top1`, `loader_spread`, `device_top1`, `device_spread` (after the last epoch, in %: mean and standard
deviation over the orders) and `difference` (device minus loader, mean over the orders), `difference_error` (its
standard error).
"""

import statistics

from digits_on_photographs import PROJECT, console, curve, train
from figures import parser_of_runs, write_figures
from rich.table import Table

RENDERERS = ("loader", "device")
RECIPE = (
    *("trainer=cpu", "data=digits", "model=vit_nano", "augment=crop", "augment.auto_augment=rand-m5-mstd0.5-inc1"),
    *("callbacks.model_summary=null", "callbacks.ema=null", "callbacks.progress=null", "seed=1"),
)


def main() -> None:
    """Run the comparison."""
    parser = parser_of_runs(__doc__, PROJECT / "logs" / "renderers", 20, "each training")
    parser.add_argument("--orders", type=int, default=6, help="orders of the images, at least 2")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(title="Top-1 of the held-out digits after the last epoch, %")
    for name in ("order", *RENDERERS):
        table.add_column(name, justify="right")
    top1: dict[str, list[float]] = {renderer: [] for renderer in RENDERERS}
    for order in range(1, options.orders + 1):
        for renderer in RENDERERS:
            overrides = (f"data.render={renderer}", f"data.seed={order}", f"epochs={options.epochs}")
            top1[renderer].append(curve(train(options.out / f"{renderer}_{order}", *RECIPE, *overrides, threads=1))[-1])
        table.add_row(str(order), *(f"{values[-1]:.2f}" for values in top1.values()))
    figures = {}
    for renderer, values in top1.items():
        figures |= {f"{renderer}_top1": statistics.mean(values), f"{renderer}_spread": statistics.stdev(values)}
    table.add_row("mean", *(f"{figures[f'{name}_top1']:.2f} ± {figures[f'{name}_spread']:.2f}" for name in RENDERERS))
    console.print(table)
    differences = [there - here for here, there in zip(top1["loader"], top1["device"], strict=True)]
    figures["difference"] = statistics.mean(differences)
    figures["difference_error"] = statistics.stdev(differences) / len(differences) ** 0.5
    console.print(f"device minus loader: {figures['difference']:+.2f} ± {figures['difference_error']:.2f} points")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
