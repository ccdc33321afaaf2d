"""Compare time and memory of targets, loss and backward pass of token labelling with the official code.

All variants use the same label maps, crops and logits, and are interleaved; losses and gradients are compared first.
The official code is read from a checkout of github.com/zihangJiang/TokenLabeling, which is not part of vitrail.

Shapes: B images, C classes, K stored classes per cell, H x W cells of a label map, N patch tokens.

Command: python benchmarks/token_labels.py --official /path/to/TokenLabeling [--batch 32] [--rounds 9]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import add_json, write_figures
from rich import get_console
from rich.table import Table
from torch import Tensor

from vitrail.data.label_maps import sparse_token_targets, token_targets
from vitrail.objectives import TokenLabelingLoss
from vitrail.training.memory import extra_memory
from vitrail.types import Outputs, Targets

CLASSES, TOP_K, CELLS, GRID = 1000, 5, 18, 14


def read_official(checkout: Path) -> tuple[Callable[..., Any], Any]:
    """Return the official target function and loss; this executes two files of the checkout."""
    names: dict[str, Any] = {}
    for file in ("tlt/data/mixup.py", "tlt/loss/cross_entropy.py"):
        exec(compile((checkout / file).read_text(), file, "exec"), names)
    return names["mixup_target"], names["TokenLabelCrossEntropy"]()


class Sides:
    """Targets, loss and backward pass of each variant, on the same maps, crops and logits.

    Args:
        batch: B, number of images.
        official: the official target function and loss.
    """

    def __init__(self, batch: int, official: tuple[Callable[..., Any], Any]) -> None:
        torch.manual_seed(0)
        self.official_targets, self.official_loss = official
        self.loss = TokenLabelingLoss()
        # Scores and classes (B, K, H, W), as stored by an annotator.
        self.scores = (torch.randn(batch, TOP_K, CELLS, CELLS) * 3 + 5).half().float()
        chosen = [torch.stack([torch.randperm(CLASSES)[:TOP_K] for _ in range(CELLS**2)], 1) for _ in range(batch)]
        self.classes = torch.stack(chosen).view(batch, TOP_K, CELLS, CELLS)
        corner, size = torch.rand(batch, 2) * 0.4, 0.3 + torch.rand(batch, 2) * 0.3  # (vertical, horizontal)
        # The official format (B, 3, K, H, W): scores, classes, and the crop in the first cell of the third channel.
        self.packed = torch.zeros(batch, 3, TOP_K, CELLS, CELLS)
        self.packed[:, 0], self.packed[:, 1] = self.scores, self.classes
        self.packed[:, 2, 0, 0, :2], self.packed[:, 2, 0, 0, 2:4] = corner, size
        self.boxes = torch.cat((corner.flip(1), (corner + size).flip(1)), 1)  # (B, 4)
        self.flipped = torch.zeros(batch, dtype=torch.bool)
        self.cls = torch.randn(batch, CLASSES, requires_grad=True)  # (B, C) logits
        self.tokens = torch.randn(batch, GRID**2, CLASSES, requires_grad=True)  # (B, N, C) logits

    def steps(self) -> dict[str, Callable[[], Tensor]]:
        """Return the variants to compare, the reference first."""
        return {
            "official": self.official,
            "sparse": lambda: self.ours(sparse_token_targets),
            "dense": lambda: self.ours(token_targets),
        }

    def official(self) -> Tensor:
        """Run the official code, on a copy because it changes its input; return its scalar loss."""
        target = self.official_targets(self.packed.clone(), CLASSES, 1.0, 0.1, "cpu", GRID)
        value = self.official_loss((self.cls, self.tokens, (0, 0, 0, 0)), target)
        value.backward()
        return value

    def ours(self, form: Callable[..., Any]) -> Tensor:
        """Run our code with sparse or dense targets; return its scalar loss."""
        grid = (GRID, GRID)
        with torch.no_grad():
            made = form(self.scores, self.classes, self.boxes, self.flipped, grid, CLASSES, 0.1, transpose_crops=True)
        value = self.loss(Outputs(self.cls, self.tokens), Targets(made.cls, made.tokens))["loss"]
        value.backward()
        return value

    def forget(self) -> None:
        """Reset the gradients."""
        self.cls.grad = self.tokens.grad = None


class Measured(NamedTuple):
    """Measurements of one variant."""

    loss: float
    gradient: Tensor  # (B, N, C) gradient of the token logits
    seconds: list[float]  # per round
    megabytes: float  # peak memory above the start


def measure(sides: Sides, rounds: int) -> dict[str, Measured]:
    """Measure losses and gradients, then times (interleaved), then memory."""
    steps = sides.steps()
    losses, gradients, seconds = {}, {}, {name: [] for name in steps}  # type: ignore[var-annotated]
    for name, step in steps.items():
        sides.forget()
        losses[name], gradients[name] = step().item(), sides.tokens.grad
    for number in range(-2, rounds):  # the first two are warm-up rounds
        for name, step in steps.items():
            sides.forget()
            started = time.perf_counter()
            step()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    figures = {}
    for name, step in steps.items():
        sides.forget()
        figures[name] = Measured(losses[name], gradients[name], seconds[name], extra_memory(step) / 2**20)
    return figures


def main() -> None:
    """Measure all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of the official code")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each variant")
    add_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(Sides(options.batch, read_official(options.official)), options.rounds)
    reference = figures["official"]
    table = Table(title=f"batch {options.batch}, {CLASSES} classes, {GRID} x {GRID} tokens, one thread")
    for column in (
        "targets + loss + backward",
        "ms",
        "of official",
        "extra MB",
        "of official",
        "loss",
        "gradient error",
    ):
        table.add_column(column, justify="right")
    ratios: dict[str, float] = {}
    for name, side in figures.items():
        ratio = statistics.median(own / other for own, other in zip(side.seconds, reference.seconds, strict=True))
        off = float((side.gradient - reference.gradient).abs().max() / reference.gradient.abs().max())
        table.add_row(
            *(name, f"{1e3 * statistics.median(side.seconds):.0f}", f"{ratio:.3f}", f"{side.megabytes:.0f}"),
            *(f"{side.megabytes / reference.megabytes:.3f}", f"{side.loss:.6f}", f"{off:.1e}"),
        )
        ratios |= {f"{name}_time": ratio, f"{name}_memory": side.megabytes / reference.megabytes}
    get_console().print(table)
    write_figures(options.json, ratios)


if __name__ == "__main__":
    main()
