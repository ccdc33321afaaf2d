"""Compare whole trainings with either renderer, offline: `python benchmarks/renderers.py`.

DeiT-nano learns the embedded digits with RandAugment, random erasing and one seed: once with Pillow in the loader, once
with the device's renderer, and several times with Pillow and another order and augmentation of the images. The two
renderers should differ no more than two orders do.

Figures: `loader_top1`, `device_top1` (after the last epoch, %), `orders_top1` and `orders_spread` (mean and standard
deviation over the other orders).
"""

import argparse
import statistics
from pathlib import Path

from demo import PROJECT, console, curve, train
from figures import add_json, write_figures
from rich.table import Table

RECIPE = (
    *("trainer=cpu", "data=digits", "model=deit_nano", "augment=deit", "mixing=none", "augment.hflip=0"),
    *("optimizer.lr=2e-3", "schedule.warmup_epochs=2", "callbacks.model_summary=null"),
    *("callbacks.ema=null", "callbacks.progress=null", "seed=1"),
)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "logs" / "renderers", help="output folder")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each training")
    parser.add_argument("--orders", type=int, default=4, help="trainings with another order of the images")
    add_json(parser)
    options = parser.parse_args()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    kinds = {"loader": ("data.render=loader",), "device": ("data.render=device",)}
    kinds |= {
        f"order {number}": ("data.render=loader", f"data.seed={number}") for number in range(2, options.orders + 2)
    }
    table = Table(title="Top-1 of the held-out digits after the last epoch, %")
    table.add_column("training")
    table.add_column("top-1", justify="right")
    top1 = {}
    for kind, overrides in kinds.items():
        run = train(out / kind.replace(" ", "_"), *RECIPE, *overrides, f"epochs={options.epochs}", threads=1)
        top1[kind] = curve(run)[-1]
        table.add_row(kind, f"{top1[kind]:.2f}")
    orders = [value for kind, value in top1.items() if kind.startswith("order")]
    mean, spread = statistics.mean(orders), statistics.stdev(orders)
    table.add_row("other orders", f"{mean:.2f} ± {spread:.2f}")
    console.print(table)
    figures = {"loader_top1": top1["loader"], "device_top1": top1["device"]}
    write_figures(options.json, {**figures, "orders_top1": mean, "orders_spread": spread})


if __name__ == "__main__":
    main()
