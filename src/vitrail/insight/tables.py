"""Tables that end a training or an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table



def training_table(results: Mapping[str, Any], directory: Path) -> Table:
    """What a training gave, where its files lie, and what can be done next."""
    table = Table(title="Training finished", show_header=False, title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("best top-1", _both(results, "val/top1"))
    table.add_row("best top-5", _both(results, "val/top5"))
    table.add_row("training", f"{results['epochs']} epochs in {results['seconds']:.0f} s")
    table.add_row("speed", f"{results['images_per_second']:,.0f} images/s")
    if results.get("skipped_images"):
        table.add_row("skipped", f"{results['skipped_images']} unreadable images, see {_near(directory)}/skipped.txt")
    table.add_section()
    table.add_row("run directory", _near(directory))
    table.add_row("checkpoint", _near(directory / "checkpoints" / "best.ckpt"))
    table.add_row("config", _near(directory / "config.yaml"))
    table.add_row("metrics", _near(directory / "metrics.csv"))
    table.add_section()
    table.add_row("evaluate", f"python src/eval.py ckpt={_near(directory)}")
    table.add_row("resume", f"python src/train.py resume={_near(directory)} epochs={2 * results['epochs']}")
    table.add_row("your images", "python src/train.py data=imagefolder data.root=/path/with/train/and/val")
    return table


def evaluation_table(results: Mapping[str, Mapping[str, float]], what: str) -> Table:
    """Loss and accuracies of each set of weights."""
    table = Table(title=what, title_style="bold")
    for name in ("weights", "images", "loss", "top-1 %", "top-5 %"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for weights, values in results.items():
        table.add_row(
            weights,
            f"{values['images']:.0f}",
            f"{values['loss']:.4f}",
            f"{values['top1']:.2f}",
            f"{values['top5']:.2f}",
        )
    return table


def _both(results: Mapping[str, Any], metric: str) -> str:
    text = f"{results[metric]:.2f} % with the raw weights"
    if results.get(f"{metric}_ema") is not None:
        text += f", {results[f'{metric}_ema']:.2f} % with their EMA"
    return text


def _near(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
