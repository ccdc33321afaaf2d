"""Measure whether token labels help, on real images, offline: `make demo`.

1. Paste handwritten digits at random positions on crops of photographs, and save them as JPEGs of 64 x 64 pixels.
2. Train a small convnet on them, and annotate them with it: 8 x 8 cells per image.
3. Train LV-ViT-nano on crops of 30 to 100 % of the image in four ways: with label maps for the class token and the
   patch tokens (labels), for the class token alone (class), for the patch tokens alone (patches), and without
   (neither).
4. Annotate the photographs themselves with EfficientNet-Lite0 and its ImageNet weights.

`make demo ARGS=full` is the whole experiment, for hours or on a GPU. It chooses learning rate and warm-up of each way
with seeds of their own, in runs of 12 epochs. With other seeds it trains all four ways for 12 epochs (three seeds), and
`labels` and `neither` for 24 epochs (five seeds), and writes `results/demo.json`. `make demo` prints that file, and
trains `labels` and `neither` for 12 epochs with three seeds.

`--compare teacher` compares another pair in step 3: DeiT-nano with a distillation token, trained with the convnet as
teacher or with the labels only, on crops of 60 to 100 %. `--compare features` compares three: LV-ViT-nano with the
convnet's features as targets of its patch tokens, with token labels, and with neither.

Every step calls a program of `src/` and prints its command. Finished steps are kept, so that an interrupted demo
resumes. `--scale 0.5` halves the number of images and epochs.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from comparisons import Curves, draw_curves, report, show
from digits_on_photographs import (
    PROJECT,
    annotate_digits,
    annotate_photographs,
    build_annotator,
    console,
    curve,
    data_options,
    train,
    write_data,
    write_photographs,
)
from figures import add_json, write_figures
from rich.table import Table

STATED = PROJECT / "results" / "demo.json"
SEEDS = (1, 2, 3, 4, 5)
FEW = SEEDS[:3]  # of `make demo` and of what else is compared
SEARCH_SEEDS = (11, 12)
SHORT, LONG = 12, 24  # epochs of `make demo`, the search and other comparisons; epochs of the whole experiment
FIRST_RATES = {1: 5e-4, 3: 1e-3}  # learning rate from which the search rises, for each number of epochs of warm-up
_BUDGETS = {"short": f"{SHORT} epochs", "long": f"{LONG} epochs"}
_ON_GPU = ("trainer=gpu", "trainer.precision=32-true", "kernels.tf32=false", "compile=null", "data.render=loader")


class Settings(NamedTuple):
    """What is chosen for each way of training: learning rate, and epochs of warm-up."""

    lr: float
    warmup: int


class Demo:
    """Trainings on the digits in one output folder, several at a time with one thread each.

    Args:
        out: output folder; data, annotator and label maps are made there.
        scale: factor of the number of images and epochs.
        parallel: runs at a time.
        gpu: train LV-ViT-nano on a GPU, in fp32 as on the CPU.
    """

    def __init__(self, out: Path, scale: float = 1.0, parallel: int = 2, gpu: bool = False) -> None:
        self.out, self.scale, self.parallel = out, scale, parallel
        out.mkdir(parents=True, exist_ok=True)
        self.data = write_data(out, scale)
        self.annotator = build_annotator(out, self.data, max(2, round(5 * scale)))
        self.maps = annotate_digits(out, self.data, self.annotator)
        device = _ON_GPU if gpu else ()
        self.shared = (*data_options(self.data), *device, "trainer.gradient_clip_val=1")

    @property
    def labelled(self) -> tuple[str, ...]:
        """Return the overrides of LV-ViT-nano with token labels."""
        head = ("model=lvvit_nano", "model.token_head=true", "objective=token_labeling")
        return (*head, f"data.label_maps={self.maps}")

    def ways(self) -> dict[str, tuple[str, ...]]:
        """Return the overrides of the four ways of training."""
        return {
            "labels": self.labelled,
            "class": (*self.labelled, "objective.token_weight=0"),
            "patches": (*self.labelled, "targets.ground_truth=only"),
            "neither": ("model=lvvit_nano", "objective=cross_entropy"),
        }

    def recipe(self, settings: Settings, epochs: int = SHORT, smallest: float = 0.3) -> tuple[str, ...]:
        """Return the overrides of a training on crops of at least `smallest` of the image.

        A crop of 0.3 may miss the digit, as published crops miss the object: the image's label is then wrong, the label
        map is not.
        """
        length = (f"epochs={max(4, round(epochs * self.scale))}", f"schedule.warmup_epochs={settings.warmup}")
        return (*self.shared, f"augment.scale=[{smallest},1.0]", *length, f"optimizer.lr={settings.lr:g}")

    def train(self, folder: str, jobs: Mapping[str, Sequence[str]], metric: str = "val/top1") -> dict[str, list[float]]:
        """Train every job in out/folder/<its name> with its overrides; return a metric in % per epoch, by name."""
        (self.out / folder).mkdir(exist_ok=True)

        def one(name: str) -> list[float]:
            return curve(train(self.out / folder / name, *jobs[name], threads=1), metric)

        with ThreadPoolExecutor(self.parallel) as pool:
            return dict(zip(jobs, pool.map(one, jobs), strict=True))

    def compare(
        self,
        settings: Mapping[str, Settings],
        kinds: Mapping[str, Sequence[str]],
        seeds: Sequence[int],
        epochs: int = SHORT,
    ) -> Curves:
        """Train all kinds (overrides by name) with the same seeds."""
        jobs = {
            f"{kind}_{seed}": (*self.recipe(settings[kind], epochs), *kinds[kind], f"seed={seed}")
            for seed in seeds
            for kind in kinds
        }
        curves = self.train("trained" if epochs == SHORT else f"trained_{epochs}", jobs)
        return {kind: {seed: curves[f"{kind}_{seed}"] for seed in seeds} for kind in kinds}

    def known(self, seeds: Sequence[int], names: Sequence[str] = ("labels", "neither")) -> Curves:
        """Train these ways with the settings of results/demo.json."""
        ways = self.ways()
        return self.compare(chosen_settings(), {name: ways[name] for name in names}, seeds)

    def try_out(self, candidates: Sequence[tuple[str, Settings]]) -> list[dict[str, Any]]:
        """Train ways with settings; return kind, settings, seed and final top-1 of each training."""
        ways = self.ways()
        rows = [
            {"kind": kind, **settings._asdict(), "seed": seed} for seed in SEARCH_SEEDS for kind, settings in candidates
        ]
        jobs = {
            "{kind}_{lr:g}_{warmup}_{seed}".format(**row): (
                *(*self.recipe(Settings(row["lr"], row["warmup"])), *ways[row["kind"]], f"seed={row['seed']}"),
            )
            for row in rows
        }
        curves = self.train("search", jobs)
        return [{**row, "top1": values[-1]} for row, values in zip(rows, curves.values(), strict=True)]

    def search(self, kinds: Sequence[str]) -> list[dict[str, Any]]:
        """With each warm-up, double the learning rate of each kind until its mean top-1 falls."""
        rows: list[dict[str, Any]] = []
        for warmup, rate in FIRST_RATES.items():
            rising, best = list(kinds), dict.fromkeys(kinds, 0.0)
            while rising:
                rows += (tried := self.try_out([(kind, Settings(rate, warmup)) for kind in rising]))
                means = {kind: statistics.mean(row["top1"] for row in tried if row["kind"] == kind) for kind in rising}
                rising = [kind for kind in rising if means[kind] > best[kind]]
                best, rate = best | means, 2 * rate
        return rows

    def experiment(self) -> dict[str, Any]:
        """Run the whole experiment, and return what `results/demo.json` holds."""
        ways = self.ways()
        search = self.search(tuple(ways))
        settings = choose(search)
        return {
            "annotator_top1": curve(self.annotator)[-1],
            "search": search,
            "chosen": {kind: value._asdict() for kind, value in settings.items()},
            "short": self.compare(settings, ways, FEW),
            "long": self.compare(settings, {kind: ways[kind] for kind in ("labels", "neither")}, SEEDS, LONG),
        }


def choose(search: Sequence[Mapping[str, Any]]) -> dict[str, Settings]:
    """Return the settings of each kind with the best mean top-1 over the search's seeds, then the best worst one."""
    found: dict[str, dict[Settings, list[float]]] = {}
    for row in search:
        found.setdefault(row["kind"], {}).setdefault(Settings(row["lr"], row["warmup"]), []).append(row["top1"])
    ranks = {
        kind: {settings: (round(statistics.mean(values), 2), min(values)) for settings, values in rows.items()}
        for kind, rows in found.items()
    }
    return {kind: max(rows, key=rows.__getitem__) for kind, rows in ranks.items()}


def report_search(search: Sequence[Mapping[str, Any]], chosen: Mapping[str, Settings]) -> None:
    """Print the search for learning rate and warm-up."""
    table = Table(title=f"Search with the seeds {', '.join(map(str, SEARCH_SEEDS))}: top-1, %")
    for name in ("", "learning rate", "warm-up", "top-1", "mean"):
        table.add_column(name, justify="right")
    found: dict[tuple[str, Settings], list[float]] = {}
    for row in search:
        found.setdefault((row["kind"], Settings(row["lr"], row["warmup"])), []).append(row["top1"])
    for (kind, settings), values in found.items():
        mark = " *" if settings == chosen[kind] else ""
        listed = ", ".join(f"{value:.1f}" for value in values)
        table.add_row(kind, f"{settings.lr:g}", str(settings.warmup), listed, f"{statistics.mean(values):.1f}{mark}")
    console.print(table)


def stated() -> dict[str, Any]:
    """Return the contents of `results/demo.json`, with seeds as numbers."""
    contents: dict[str, Any] = json.loads(STATED.read_text())
    for budget in _BUDGETS:
        curves = contents[budget].items()
        contents[budget] = {kind: {int(seed): run for seed, run in runs.items()} for kind, runs in curves}
    return contents


def panels(contents: Mapping[str, Any]) -> dict[str, Curves]:
    """Return the curves of the whole experiment, by title."""
    return {title: contents[budget] for budget, title in _BUDGETS.items()}


def chosen_settings() -> dict[str, Settings]:
    """Return the settings of each kind that the whole experiment chose."""
    return {kind: Settings(**one) for kind, one in stated()["chosen"].items()}


def report_whole(contents: Mapping[str, Any]) -> dict[str, float]:
    """Print the whole experiment, and return its figures."""
    console.print(f"annotator: {contents['annotator_top1']:.2f} % top-1 of the held-out digits")
    report_search(contents["search"], {kind: Settings(**one) for kind, one in contents["chosen"].items()})
    figures: dict[str, float] = {}
    for budget, title in _BUDGETS.items():
        measured = report(contents[budget], f"The whole experiment, {title}: top-1 of the held-out digits, %")
        figures |= {f"{budget}_{name}": value for name, value in measured.items()}
    return figures


def compare_others(demo: Demo, which: str) -> Curves:
    """Compare a teacher, or features as targets, with label maps and neither; return the curves."""
    teacher = ("teacher=run", f"teacher.ckpt={demo.annotator}")
    if which == "features":
        taught = ("model=lvvit_nano", "objective=feature_distillation", *teacher)
        settings = {"features": chosen_settings()["labels"]}
        return demo.compare(settings, {"features": taught}, FEW) | demo.known(FEW)
    student = ("model=vit", "model.name=deit_nano_distilled", "model.patch_size=8")
    kinds = {
        "with": (*student, "objective=distillation", *teacher),
        "neither": (*student, "objective=cross_entropy"),
    }
    recipe = demo.recipe(Settings(1e-3, 2), 10, 0.6)
    jobs = {f"{kind}_{seed}": (*recipe, *kinds[kind], f"seed={seed}") for seed in FEW for kind in kinds}
    curves = demo.train("teacher", jobs)
    return {kind: {seed: curves[f"{kind}_{seed}"] for seed in FEW} for kind in kinds}


def parser_of_demo(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the demos share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), default=PROJECT / "logs" / "demo")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of images and epochs")
    parser.add_argument("--parallel", type=int, default=2, help="parallel runs, one core each")
    parser.add_argument("--gpu", action="store_true", help="train LV-ViT-nano on a GPU")
    add_json(parser)
    return parser


def main() -> None:
    """Run the demo."""
    parser = parser_of_demo(__doc__)
    parser.add_argument("extent", nargs="?", choices=("part", "full"), default="part", help="how much to train")
    parser.add_argument(
        "--compare", choices=("labels", "teacher", "features"), default="labels", help="what to compare"
    )
    options = parser.parse_args()
    demo = Demo(options.out, options.scale, options.parallel, options.gpu)
    if options.extent == "full":
        contents = demo.experiment()
        if options.scale == 1:
            STATED.write_text(json.dumps(contents, indent=1) + "\n")
        write_figures(options.json, report_whole(contents))
        draw_curves(panels(contents), demo.out / "curves.png")
        return
    if options.compare == "labels":
        report_whole(stated())
        curves, picture = demo.known(FEW), demo.out / "part.png"
    else:
        curves, picture = compare_others(demo, options.compare), demo.out / f"{options.compare}.png"
    epochs = len(next(iter(curves["neither"].values())))
    write_figures(options.json, report(curves, f"Top-1 of the held-out digits after {epochs} epochs, %"))
    draw_curves({f"{epochs} epochs": curves}, picture)
    if options.compare == "labels":
        pictures = demo.out / "photographs"
        if not pictures.is_dir():
            write_photographs(pictures)
        show("digits", demo.annotator / "maps" / "preview.png")
        show("photographs", annotate_photographs(demo.out, pictures))


if __name__ == "__main__":
    main()
