"""Make every picture of README and docs: `make pictures`, without a network.

Each picture is made by the program that it shows: a training (`run.svg`), a sweep (`sweep.png`) and the page that
compares its trials (`report.png`), an evaluation (`evaluation.png`), label maps of photographs (`label_maps.jpg`), and
explanations of predictions (`explanations.jpg`) by networks of `make demo`, which are trained if they are not there, as
are those that show accuracy against operations (`token_pruning.png`) and accuracy over epochs with a teacher's features
(`feature_distillation.png`). `demo.png` and `segmentation.png` show results/demo.json and demo_segmentation.json.
`overview.jpg` shows three pictures together. With the networks of `make demo` it takes about half an hour on two cores.
Runs are kept in `--out` and `--demo`, so that an interrupted command resumes; remove these folders to repeat them. The
page needs chromium (apt-get install chromium).

`--only sweep,overview` makes some of them.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import demo_segmentation
from comparisons import draw_curves
from demo import Demo, panels, stated
from digits_on_photographs import PROJECT, annotate_photographs, console, run, train, write_photographs
from faithfulness import labelled_nano
from PIL import Image
from pruned_accuracy import train_pruned
from rich.console import Console
from rich.text import Text

DOCS = PROJECT / "docs"
LINES = 8  # epochs of a training's terminal output that are shown
TILE = 174  # pixels of a panel with its gap
HOME, RUN = "/home/you/vitrail", "logs/train/runs/2026-11-27_17-30-00_0477bf"  # paths in the pictures
_STYLE = r"(?:\x1b\[[0-9;]*m)*"


def terminal(out: Path) -> None:
    """Draw what the terminal shows of `make train`, without most of its epochs."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    options = ("callbacks.model_summary.max_depth=1", f"hydra.run.dir={folder}")
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "COLUMNS": "120"}
    command = [sys.executable, "src/train.py", *options]
    text = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, check=True).stdout.decode()
    for where, shown in ((str(folder), f"{HOME}/{RUN}"), (os.path.relpath(folder, PROJECT), RUN)):
        text = re.sub(_STYLE.join(map(re.escape, re.split("(?<=/)", where))), shown, text)
    lines = text.replace(sys.executable, "python").splitlines()
    epochs = [number for number, line in enumerate(lines) if re.search(r"epoch \d+/", re.sub(_STYLE, "", line))]
    first, last = epochs[LINES // 2], epochs[-LINES // 2]
    recorder = Console(record=True, width=118, file=io.StringIO())
    recorder.print("$ make train\n", highlight=False)
    recorder.print(Text.from_ansi("\n".join((*lines[:first], "         …", *lines[last:]))))
    recorder.save_svg(str(DOCS / "run.svg"), title="make train")


def sweep(out: Path) -> Path:
    """Search learning rate and weight decay of two networks; return the sweep's folder.

    A finished sweep only draws its figure again.
    """
    folder = out / "sweep"
    run(
        "train.py", "-m", "sweep=lr_wd", "hydra.sweeper.trials=24", "hydra.sweeper.prune=median", "epochs=5",
        "hydra.sweeper.prune_after=1", "+hydra.sweeper.space.model={choices: [vit_nano, deit_nano]}",
        "hydra.launcher.parallel=2", f"hydra.sweep.dir={folder}", log=out / "sweep.log", threads=1,
    )  # fmt: skip
    return folder


def draw_sweep(out: Path) -> None:
    """Copy the figure that ends a sweep."""
    save(Image.open(sweep(out) / "sweep.png"), "sweep.png")


def report(out: Path) -> None:
    """Take a picture of the page that compares the trials of a sweep."""
    browser = shutil.which("chromium") or sys.exit("error: report.png needs chromium: apt-get install chromium")
    page, shot = out / "report.html", out / "report.png"
    run("report.py", f"runs={sweep(out)}", f"out={page}", log=out / "report.log")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1400")
        subprocess.run(
            [browser, *options, f"--user-data-dir={profile}", f"--screenshot={shot}", page.as_uri()],
            env={**os.environ, "HOME": profile},
            capture_output=True,
            check=True,
        )
    save(Image.open(shot), "report.png")


def evaluation(out: Path) -> None:
    """Draw the figure of an evaluation."""
    trained = train(out / "eight", "epochs=8", "schedule.warmup_epochs=1", "callbacks.progress=null")
    folder = out / "evaluation"
    run("eval.py", f"ckpt={trained}", "trainer=cpu", f"hydra.run.dir={folder}", log=out / "evaluation.log")
    save(Image.open(folder / "evaluation_raw.png"), "evaluation.png")


def label_maps(out: Path) -> None:
    """Draw photographs with their label maps: four rows of the annotation's preview."""
    photographs = out / "photographs"
    if not photographs.is_dir():
        write_photographs(photographs)
    save(rows_of(Image.open(annotate_photographs(out, photographs)), 40, 186, 4), "label_maps.jpg")


def explanations(out: Path, demo: Path) -> None:
    """Draw what explains the predictions of an LV-ViT with token labels, and of a DynamicViT made from it."""
    dense = labelled_nano(demo)
    data = demo / "digits"
    pruned = demo / "pruned" / "0.5_1"
    if not (pruned / "results.json").is_file():
        train_pruned(Demo(demo), 4, (1,))
    chosen = out / "chosen.txt"
    images = (sorted((data / "train" / str(label)).glob("*.jpg"))[3] for label in (2, 6, 8))
    chosen.write_text("".join(f"{path}\n" for path in images))
    kinds = {dense: "attention,rollout,gradient,tokens", pruned: "kept"}
    left, right = (explained(out / f"explained_{path.name}", path, chosen, names) for path, names in kinds.items())
    left = left.crop((0, 0, left.width - 120, left.height))  # the names of digits are short
    save(beside(left, right.crop((TILE, 0, right.width, right.height))), "explanations.jpg")


def demo_curves(out: Path) -> None:
    """Draw accuracy over epochs of the demo's experiment, from results/demo.json."""
    draw_curves(panels(stated()), out / "demo.png")
    save(Image.open(out / "demo.png"), "demo.png")


def benchmark(demo: Path, name: str, *options: str) -> None:
    """Run a benchmark on the runs of the demo."""
    subprocess.run([sys.executable, f"benchmarks/{name}", f"--out={demo}", *options], cwd=PROJECT, check=True)


def token_pruning(demo: Path) -> None:
    """Draw accuracy against operations of DynamicViT; its benchmark trains what is not there."""
    benchmark(demo, "pruned_accuracy.py", "--json=results/pruned_accuracy.json")
    save(Image.open(demo / "pruned" / "accuracy.png"), "token_pruning.png")


def feature_distillation(demo: Path) -> None:
    """Draw accuracy over epochs with a teacher's features, token labels and neither; train what is missing."""
    benchmark(demo, "demo.py", "--compare=features", "--json=results/demo_features.json")
    save(Image.open(demo / "features.png"), "feature_distillation.png")


def segmentation(out: Path) -> None:
    """Draw the scores of segmentation with and without token labels, from results/demo_segmentation.json."""
    demo_segmentation.draw(demo_segmentation.stated(), out / "segmentation.png")
    save(Image.open(out / "segmentation.png"), "segmentation.png")


def explained(folder: Path, ckpt: Path, images: Path, kinds: str) -> Image.Image:
    """Return the maps that predict.py draws for three images, one row each, below the titles."""
    run(
        "predict.py", f"ckpt={ckpt}", f"images={images}", f"explain=[{kinds}]", f"overlay={folder}", "num_workers=0",
        "top_k=1", f"out={folder}.csv", log=folder.with_suffix(".log"),
    )  # fmt: skip
    height = 22 + TILE
    sheets = [Image.open(path) for path in sorted(folder.rglob("*.jpg"))]
    sheets = [sheet.crop((0, sheet.height - height, sheet.width, sheet.height)) for sheet in sheets]
    joined = Image.new("RGB", (max(sheet.width for sheet in sheets), 22 + TILE * len(sheets)), "white")
    for number, sheet in enumerate(sheets):
        joined.paste(
            sheet if number == 0 else sheet.crop((0, 22, sheet.width, height)), (0, number and 22 + TILE * number)
        )
    return joined


def overview(_: Path) -> None:
    """Put the page, label maps and explanations together."""
    page = Image.open(DOCS / "report.png").convert("RGB")
    maps = rows_of(Image.open(DOCS / "label_maps.jpg"), 40, 186, 2)
    maps = maps.crop((0, 22, maps.width, maps.height))
    explained_rows = Image.open(DOCS / "explanations.jpg")
    width = 1600
    left, right = 560, width - 560 - 20
    page = page.resize((left, left * page.height // page.width), Image.Resampling.LANCZOS)
    maps = maps.resize((right, right * maps.height // maps.width), Image.Resampling.LANCZOS)
    below = explained_rows.crop((0, 0, explained_rows.width, 22 + 2 * TILE))
    below = below.resize((right, right * below.height // below.width), Image.Resampling.LANCZOS)
    height = maps.height + 24 + below.height
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(page.crop((0, 0, left, height)), (0, 0))
    sheet.paste(maps, (left + 20, 0))
    sheet.paste(below, (left + 20, maps.height + 24))
    save(sheet, "overview.jpg")


def rows_of(sheet: Image.Image, head: int, step: int, count: int) -> Image.Image:
    """Return the first rows of a sheet of panels."""
    return sheet.convert("RGB").crop((0, 0, sheet.width, head + step * count))


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two pictures side by side."""
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    return sheet


def save(picture: Image.Image, name: str) -> None:
    """Save a picture in docs/; PNG with 128 colours, which is enough for figures and pages."""
    path = DOCS / name
    picture = picture.convert("RGB")
    if path.suffix == ".png":
        picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        picture.save(path, quality=85, optimize=True)
    console.print(f"{path.relative_to(PROJECT)}: {path.stat().st_size / 1000:.0f} kB", highlight=False)


def makers_of(demo: Path) -> dict[str, Callable[[Path], None]]:
    """Return what draws each picture of docs/ with files in an output folder; `demo` is the folder of `make demo`."""
    return {
        "run": terminal,
        "sweep": draw_sweep,
        "report": report,
        "evaluation": evaluation,
        "label_maps": label_maps,
        "explanations": lambda out: explanations(out, demo),
        "demo": demo_curves,
        "token_pruning": lambda _: token_pruning(demo),
        "feature_distillation": lambda _: feature_distillation(demo),
        "segmentation": segmentation,
        "overview": overview,
    }


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), default=PROJECT / "logs" / "pictures")
    parser.add_argument("--demo", type=lambda text: Path(text).absolute(), default=PROJECT / "logs" / "demo")
    parser.add_argument("--only", help="names of pictures, separated by commas; default: all")
    options = parser.parse_args()
    makers = makers_of(options.demo)
    names = options.only.split(",") if options.only else list(makers)
    if unknown := [name for name in names if name not in makers]:
        sys.exit(f"error: --only {','.join(unknown)}: choose from {', '.join(makers)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        makers[name](options.out)


if __name__ == "__main__":
    main()
