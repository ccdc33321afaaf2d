"""Measure training on one GPU: DeiT-S, DeiT-B, T2T-ViT-14, and LV-ViT-S with token labels, each by its recipe.

Each network is compiled and eager, on batches made in advance and on packed files (pixels of 256, smooth noise that is
made at the start, rendered on the device), beside a bare PyTorch loop of the same network in the same process. The
cases are in the order of their importance; those for which no time is left are listed as left out.

A row for each is appended to results/gpu.csv. Figures: `<model>_<compiled or eager>_<synthetic or packed>_...`:
`images_per_second`, `share_of_peak`, `time_over_bare` (synthetic), `over_synthetic` (packed: throughput over that on
batches made in advance).

Command: python benchmarks/gpu.py [--minutes 7.5] [--csv results/gpu.csv] [--json FILE]
`--device cpu` is a dry run with tiny networks.
"""

import argparse
import csv
import datetime
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from figures import add_json, write_figures
from PIL import Image

from vitrail.data.label_maps import LabelMapStore
from vitrail.data.sources import ImageFolder
from vitrail.data.sources.packed import PackOptions, PackWriter
from vitrail.runs.directory import versions
from vitrail.runs.logs import set_up_logging
from vitrail.runs.measured_config import training_config
from vitrail.runs.measuring import Figures, MeasuredTraining
from vitrail_runtime import resolvers

PROJECT = Path(__file__).resolve().parent.parent
MODELS = {
    "deit_small": ["experiment=deit_small"],
    "lvvit_s": ["experiment=lvvit_s"],
    "t2t_vit_14": ["experiment=t2t_vit_14"],
    "deit_base": ["experiment=deit_base"],
}
TINY = {
    "deit_small": ["model=deit_nano"],
    "lvvit_s": ["model=lvvit_nano", "model.token_head=true"],
    "t2t_vit_14": ["model=t2t_vit", "model.name=t2t_vit_7", "+model.depth=1"],
    "deit_base": ["model=vit_nano"],
}
"""Networks of the dry run, for the recipes of `MODELS`."""

MAP = (5, 18, 18)
COLUMNS = (
    *("date", "card", "torch", "timm", "model", "loop", "compiled", "precision", "batch", "input"),
    *("images_per_second", "ms_per_step", "memory_gib", "share_of_peak", "commit", "command"),
)
GUESS = {True: 75.0, False: 25.0}
"""Seconds that a case takes, compiled or not, before one has been measured."""


class Case(NamedTuple):
    """One training to measure."""

    model: str
    is_compiled: bool
    is_packed: bool

    @property
    def name(self) -> str:
        """Name in figures and messages."""
        way, data = "compiled" if self.is_compiled else "eager", "packed" if self.is_packed else "synthetic"
        return f"{self.model}_{way}_{data}"


class Scale(NamedTuple):
    """Sizes of a measurement."""

    batch: int
    warmup: int
    steps: int
    classes: int
    overrides: tuple[str, ...]


GPU = Scale(256, 8, 30, 1000, ("trainer=gpu", f"data.num_workers={min(12, os.cpu_count() or 1)}"))
DRY = Scale(4, 1, 2, 8, ("trainer=cpu", "data.image_size=64", "data.num_workers=0", "data.render=device"))


def cases(compiles: bool) -> list[Case]:
    """Return the cases, the most important ones first."""
    ways = (True, False) if compiles else (False,)
    first = [Case(model, way, False) for way in ways for model in MODELS]
    packed = [Case(model, way, True) for way in ways for model in MODELS]
    return [first[0], packed[0], *first[1:], *packed[1:]]


def write_data(root: Path, count: int, classes: int) -> None:
    """Write a pack of `count` pictures of smooth noise to `root`/pack, and label maps of them to `root`/maps."""
    random, files = np.random.default_rng(0), []
    for number in range(64):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        files.append(root / f"{number}.jpg")
        coarse.resize((341, 256), Image.Resampling.BICUBIC).save(files[-1], quality=92)
    for split, number in (("train", count), ("val", classes)):
        for index in range(number):
            path = root / "images" / split / f"{index % classes:04d}" / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(files[index % len(files)])
    writer = PackWriter(root / "pack", ImageFolder(str(root / "images")), PackOptions(256, "raw"))
    writer.begin(None)
    for shard in writer.shards():
        writer.write(shard)
    writer.finish()
    split = ImageFolder(str(root / "images")).open("train")
    maps = LabelMapStore.create(root / "maps", len(split), MAP[0], MAP[1:], classes, list(split.keys()))
    ranks = np.arange(MAP[0])[:, None, None]
    scores = np.broadcast_to(8.0 - ranks, MAP)
    for index, label in enumerate(split.labels):
        maps.write(index, scores, np.broadcast_to((label + ranks) % classes, MAP))
    maps.finish()


def overrides_of(case: Case, scale: Scale, data: Path, dry: bool) -> list[str]:
    """Return the overrides of a case's training."""
    chosen = [*MODELS[case.model], *(TINY[case.model] if dry else []), *scale.overrides]
    chosen += [f"data.batch_size={scale.batch}", f"compile={'default' if case.is_compiled else 'null'}"]
    if case.is_packed:
        chosen += ["data=packed", f"data.root={data}/pack", "data.repeats=1"]
        if case.model == "lvvit_s":
            chosen.append(f"data.label_maps={data}/maps")
    return chosen


def measure(case: Case, scale: Scale, data: Path, dry: bool) -> tuple[Figures, list[dict[str, Any]]]:
    """Measure one case; return its figures and its rows for the CSV file."""
    torch.compiler.reset()  # networks that were compiled before count towards its limit
    with tempfile.TemporaryDirectory() as folder:
        config = training_config(overrides_of(case, scale, data, dry))
        training = MeasuredTraining(config, Path(folder), scale.warmup, scale.steps, synthetic=not case.is_packed)
        training.run(bare=not case.is_packed)
        figures = training.figures()
        return figures, rows_of(case, training, figures)


def rows_of(case: Case, training: MeasuredTraining, figures: Figures) -> list[dict[str, Any]]:
    """Return the rows of a case for the CSV file: of the training, and of its bare loop."""
    common = {
        "date": datetime.date.today().isoformat(),
        "card": training.device_name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "model": training.name,
        "compiled": "yes" if case.is_compiled else "no",
        "precision": str(training.config.trainer.precision).removesuffix("-mixed"),
        "batch": figures.batch_size,
        "commit": versions()["commit"] or "unknown",
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }
    source = "packed pixels of 256" if case.is_packed else "synthetic, on the device"
    share = "" if figures.share_of_peak is None else f"{figures.share_of_peak:.4f}"
    own = {"loop": f"vitrail: {MODELS[case.model][0]}", "memory_gib": f"{figures.peak_memory / 2**30:.2f}"}
    rows = [{**common, **own, **_speed(figures.batch_size, figures.seconds), "input": source, "share_of_peak": share}]
    if figures.bare is not None:
        rows.append({**common, "loop": "bare", **_speed(figures.batch_size, figures.bare), "input": source})
    return rows


def _speed(batch: int, seconds: float) -> dict[str, str]:
    return {"images_per_second": f"{batch / seconds:.1f}", "ms_per_step": f"{1e3 * seconds:.2f}"}


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file with these columns."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def run(options: argparse.Namespace) -> dict[str, float]:
    """Measure as many cases as there is time for; print and append each, and return the figures."""
    dry = options.device == "cpu"
    scale = DRY if dry else GPU
    deadline, takes, figures = time.monotonic() + 60 * options.minutes, dict(GUESS), {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_data(data, (scale.warmup + scale.steps + 3) * scale.batch, scale.classes)
        for case in cases(compiles=not dry):
            started = time.monotonic()
            if started + takes[case.is_compiled] > deadline:
                print(f"{case.name:36} left out: no time left")
                continue
            try:
                measured, rows = measure(case, scale, data, dry)
            except Exception as error:  # the other cases are still worth measuring
                print(f"{case.name:36} left out: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            takes[case.is_compiled] = time.monotonic() - started
            append(options.csv, rows)
            figures |= _named(case, measured, figures)
            print(f"{case.name:36} " + _line(measured), flush=True)
    return figures


def _named(case: Case, measured: Figures, before: dict[str, float]) -> dict[str, float]:
    speed = measured.batch_size / measured.seconds
    named = {"images_per_second": speed, "share_of_peak": measured.share_of_peak}
    if measured.bare is not None:
        named["time_over_bare"] = measured.seconds / measured.bare
    synthetic = before.get(f"{case._replace(is_packed=False).name}_images_per_second")
    if case.is_packed and synthetic is not None:
        named["over_synthetic"] = speed / synthetic
    return {f"{case.name}_{name}": value for name, value in named.items() if value is not None}


def _line(measured: Figures) -> str:
    share = "" if measured.share_of_peak is None else f", {100 * measured.share_of_peak:.1f} % of the peak"
    bare = "" if measured.bare is None else f", time over bare {measured.seconds / measured.bare:.3f}"
    parts = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in measured.parts.items())
    return f"{measured.batch_size / measured.seconds:,.0f} images/s{share}{bare}; ms: {parts}"


def main() -> None:
    """Measure and print the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with tiny networks")
    parser.add_argument("--minutes", type=float, default=7.5, help="no case starts that may end later")
    parser.add_argument("--csv", type=Path, default=PROJECT / "results" / "gpu.csv", help="file to append rows to")
    add_json(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch sees no GPU here; --device cpu is a dry run.")
    resolvers.register()
    set_up_logging()
    figures = run(options)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
