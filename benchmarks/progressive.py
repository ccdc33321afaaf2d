"""Measure progressive training on the embedded digits, offline: `python benchmarks/progressive.py`.

Four runs of a small ViT with three seeds each:

- plain: all epochs at 32 pixels, with RandAugment at magnitude 9;
- progressive: the same epochs in EfficientTrain's phases, 24, 28 and 32 pixels, magnitudes 1 to 9;
- magnitudes: the progressive training's magnitudes, but 32 pixels throughout, to tell the two effects apart;
- short: plain, with as many epochs as the operations of the progressive training pay for.

Prints top-1 after the last epoch, mean and spread, against the share of the operations, in 15 minutes on one core.
Finished runs are kept, so that an interrupted measurement resumes.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from digits_on_photographs import PROJECT, console, curve, train
from figures import parser_of_runs, write_figures
from hydra import compose, initialize_config_dir
from rich.table import Table

from vitrail.commands.plan import make_plan
from vitrail_runtime import resolvers

RECIPE = (
    *("trainer=cpu", "data=digits", "model=deit_nano", "augment.auto_augment=rand-m9-mstd0.5-inc1"),
    *("optimizer.lr=2e-3", "schedule.warmup_epochs=2", "callbacks.model_summary=null"),
    *("callbacks.ema=null", "callbacks.progress=null"),
)
SEEDS = (1, 2, 3)
PHASES = ("phases=efficienttrain", "phases.multiple=4")
FULL_SIZE = ",".join(f"{{share:0.2,image_size:224,magnitude:{magnitude}}}" for magnitude in (1, 3, 5, 7, 9))


def operations_share(epochs: int) -> float:
    """Return the operations of the progressive training relative to those of the plain one."""
    resolvers.register()
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return make_plan(compose("train", [*RECIPE, *PHASES, f"epochs={epochs}", "paths.run=unused"])).operations


def measure(out: Path, epochs: int, share: float, parallel: int) -> dict[str, list[float]]:
    """Train each kind with each seed; return top-1 in % after the last epoch, for each seed."""
    kinds = {
        "plain": (f"epochs={epochs}",),
        "progressive": (*PHASES, f"epochs={epochs}"),
        "magnitudes": (*PHASES, f"phases.calendar=[{FULL_SIZE}]", f"epochs={epochs}"),
        "short": (f"epochs={max(1, round(share * epochs))}",),
    }
    jobs = [(kind, seed) for seed in SEEDS for kind in kinds]
    with ThreadPoolExecutor(parallel) as pool:
        runs = [
            pool.submit(train, out / f"{kind}_{seed}", *RECIPE, *kinds[kind], f"seed={seed}", threads=1)
            for kind, seed in jobs
        ]
        final = [curve(run.result())[-1] for run in runs]
    return {name: [top1 for (kind, _), top1 in zip(jobs, final, strict=True) if kind == name] for name in kinds}


def main() -> None:
    """Run the measurement."""
    out = PROJECT / "logs" / "progressive"
    parser = parser_of_runs(__doc__, out, 24, "the plain and the progressive training")
    parser.add_argument("--parallel", type=int, default=1, help="parallel runs, one core each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    share = operations_share(options.epochs)
    found = measure(options.out, options.epochs, share, options.parallel)
    table = Table(title="Top-1 of the held-out digits after the last epoch, %")
    for name in ("training", "operations", *(f"seed {seed}" for seed in SEEDS), "mean", "spread"):
        table.add_column(name, justify="right")
    figures = {"flops_share": share}
    for kind, values in found.items():
        mean, spread = statistics.mean(values), statistics.stdev(values)
        cells = [f"{value:.1f}" for value in (*values, mean, spread)]
        table.add_row(kind, f"{share if kind in ('progressive', 'short') else 1.0:.2f}", *cells)
        figures |= {f"{kind}_top1": mean, f"{kind}_spread": spread}
    console.print(table)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
