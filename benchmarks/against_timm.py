"""Measure a whole training against timm's `train.py`: processor time and wall time of both programs, on the CPU.

Both train DeiT-Ti at 64 pixels with AdamW, label smoothing, a random crop and EMA weights, batch 32 and one loader
process, for two epochs of 6,000 small JPEGs, and evaluate raw and EMA weights after each epoch. Everything else is the
program's default. vitrail's includes the checks, checkpoints and pictures of every run, and PyTorch's fused AdamW.
timm's includes its checkpoints, AdamW one parameter at a time (`--opt-kwargs fused=True` would change it), and reading
the validation images twice, once for each set of weights. The programs take turns, and every second round begins with
timm, so that drift of the machine affects both alike. Processor time includes the loader processes.

Figures:
- `cpu_over_timm`, `wall_over_timm`: vitrail's time over timm's, median of all rounds.
- `<vitrail or timm>_<cpu or wall>_seconds`: the whole training.
- `..._startup_seconds`: the same training with one epoch of two batches, and `..._epoch_seconds`: each of the two
  epochs beyond that.

Command: python benchmarks/against_timm.py --timm <checkout of pytorch-image-models> [--rounds 3] [--json FILE]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from figures import add_json, write_figures
from jpegs import write_images

PROJECT = Path(__file__).resolve().parent.parent
CLASSES, BATCH, SIZE = 10, 32, (128, 96)
PROGRAMS = ("vitrail", "timm")
KINDS = ("cpu", "wall")


class Seconds(NamedTuple):
    """Time of a program."""

    cpu: float
    """Processor time of all its processes."""
    wall: float


def vitrails_command(data: Path, epochs: int, out: Path) -> list[str]:
    """Return the command of vitrail's training."""
    return [
        str(PROJECT / "src" / "train.py"),
        *("trainer=cpu", f"epochs={epochs}", f"paths.logs={out}", f"paths.cache={out / 'cache'}"),
        *("data=imagefolder", f"data.root={data}", "data.image_size=64", f"data.batch_size={BATCH}"),
        *(
            "data.num_workers=1",
            "augment.scale=[0.08,1.0]",
            "augment.ratio=[0.75,1.3333]",
            "augment.color_jitter=0.4",
            "augment.crop_pct=0.9",
        ),
        *("model=deit", "model.name=deit_tiny_patch16_224", "optimizer.lr=5e-4", "schedule.warmup_epochs=0"),
    ]


def timms_command(checkout: Path, data: Path, epochs: int, out: Path) -> list[str]:
    """Return the command of timm's training, with vitrail's settings."""
    return [
        str(checkout / "train.py"),
        *("--device", "cpu", "--epochs", str(epochs), "--output", str(out)),
        *("--data-dir", str(data), "--num-classes", str(CLASSES), "--batch-size", str(BATCH), "--workers", "1"),
        *("--img-size", "64", "--ratio", "0.75", "1.3333", "--train-interpolation", "bicubic"),
        *("--crop-pct", "0.9", "--smoothing", "0.1"),
        *("--model", "deit_tiny_patch16_224", "--model-kwargs", "img_size=64", "--drop-path", "0.1"),
        *("--opt", "adamw", "--weight-decay", "0.05", "--lr", "5e-4", "--min-lr", "1e-5", "--warmup-epochs", "0"),
        "--sched-on-updates",
        *("--model-ema", "--model-ema-decay", "0.9999", "--model-ema-warmup"),
    ]


def measured(arguments: list[str], folder: Path) -> Seconds:
    """Run a Python program in `folder`, and return its time.

    Raises:
        RuntimeError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")  # where a checkout may not be writable
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        raise RuntimeError(f"{arguments[0]} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return Seconds(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def in_turns(run: Callable[[str], Seconds], rounds: int) -> dict[str, list[Seconds]]:
    """Return the time of both programs in each round; every second round begins with the other program."""
    seconds: dict[str, list[Seconds]] = {program: [] for program in PROGRAMS}
    for number in range(rounds):
        for program in PROGRAMS if number % 2 == 0 else PROGRAMS[::-1]:
            seconds[program].append(run(program))
    return seconds


def measure(checkout: Path, images: int, epochs: int, rounds: int) -> tuple[dict[str, float], list[str]]:
    """Return all figures, and a line about each round."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        large, small, out = root / "large", root / "small", root / "out"
        write_images(large, images, max(BATCH, images // 6), SIZE, CLASSES)
        write_images(small, 2 * BATCH, BATCH, SIZE, CLASSES)

        def training(data: Path, epochs: int) -> Callable[[str], Seconds]:
            return lambda program: measured(
                vitrails_command(data, epochs, out)
                if program == "vitrail"
                else timms_command(checkout, data, epochs, out),
                root,
            )

        in_turns(training(small, 1), 1)  # fills the caches of the file system and of compiled Python files
        startup = in_turns(training(small, 1), rounds)
        whole = in_turns(training(large, epochs), rounds)
    figures: dict[str, float] = {}
    for kind in KINDS:
        ratios = [getattr(mine, kind) / getattr(timms, kind) for mine, timms in zip(*whole.values(), strict=True)]
        figures[f"{kind}_over_timm"] = statistics.median(ratios)
    for program in PROGRAMS:
        for kind in KINDS:
            whole_, startup_ = (
                statistics.median(getattr(seconds, kind) for seconds in times[program]) for times in (whole, startup)
            )
            figures[f"{program}_{kind}_seconds"] = whole_
            figures[f"{program}_{kind}_startup_seconds"] = startup_
            figures[f"{program}_{kind}_epoch_seconds"] = (whole_ - startup_) / epochs
    lines = [
        f"vitrail / timm: cpu {mine.cpu:.1f} / {timms.cpu:.1f} s = {mine.cpu / timms.cpu:.3f},"
        f" wall {mine.wall:.1f} / {timms.wall:.1f} s = {mine.wall / timms.wall:.3f}"
        for mine, timms in zip(*whole.values(), strict=True)
    ]
    return figures, lines


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", type=lambda text: Path(text).absolute(), required=True, help="checkout with train.py")
    parser.add_argument("--images", type=int, default=6000, help="training images, at least 32")
    parser.add_argument("--epochs", type=int, default=2, help="epochs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    add_json(parser)
    args = parser.parse_args()
    if not (args.timm / "train.py").is_file():
        parser.error(f"--timm {args.timm}: contains no train.py; give a checkout of pytorch-image-models.")
    figures, lines = measure(args.timm, args.images, args.epochs, args.rounds)
    print("\n".join(lines))
    for name, value in figures.items():
        print(f"{name:32} {value:10.4g}")
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
