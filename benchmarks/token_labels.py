"""Targets, loss and backward pass of token labelling against the official code: time and extra memory, in one run.

Both sides get the same label maps, crops and logits, in turns; losses and gradients are compared first. The official
side is read from a checkout of github.com/zihangJiang/TokenLabeling, which is not part of vitrail.

Command: python benchmarks/token_labels.py --official /path/to/TokenLabeling [--batch 32] [--rounds 9]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.table import Table

from vitrail.data.label_maps import sparse_token_targets, token_targets
from vitrail.objectives import TokenLabelingLoss
from vitrail.run.benchmark import extra_memory
from vitrail.types import Heads, Targets

CLASSES, TOP_K, CELLS, GRID = 1000, 5, 18, 14


def read_official(checkout: Path) -> tuple[Callable[..., Any], Any]:
    """The official target function and loss; executes two files of the checkout."""
    names: dict[str, Any] = {}
    for file in ("tlt/data/mixup.py", "tlt/loss/cross_entropy.py"):
        exec(compile((checkout / file).read_text(), file, "exec"), names)
    return names["mixup_target"], names["TokenLabelCrossEntropy"]()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of the official code")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = options.batch
    scores = (torch.randn(batch, TOP_K, CELLS, CELLS) * 3 + 5).half().float()
    chosen = [torch.stack([torch.randperm(CLASSES)[:TOP_K] for _ in range(CELLS**2)], 1) for _ in range(batch)]
    classes = torch.stack(chosen).view(batch, TOP_K, CELLS, CELLS)
    corner, sides = torch.rand(batch, 2) * 0.4, 0.3 + torch.rand(batch, 2) * 0.3  # (vertical, horizontal)
    packed = torch.zeros(batch, 3, TOP_K, CELLS, CELLS)
    packed[:, 0], packed[:, 1] = scores, classes
    packed[:, 2, 0, 0, :2], packed[:, 2, 0, 0, 2:4] = corner, sides
    boxes, flipped = torch.cat((corner.flip(1), (corner + sides).flip(1)), 1), torch.zeros(batch, dtype=torch.bool)
    cls = torch.randn(batch, CLASSES, requires_grad=True)
    tokens = torch.randn(batch, GRID**2, CLASSES, requires_grad=True)
    official_targets, official_loss = read_official(options.official)
    loss = TokenLabelingLoss()

    def official() -> torch.Tensor:
        target = official_targets(packed.clone(), CLASSES, 1.0, 0.1, "cpu", GRID)  # changes its input
        value = official_loss((cls, tokens, (0, 0, 0, 0)), target)
        value.backward()
        return value

    def ours(form: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            made = form(scores, classes, boxes, flipped, (GRID, GRID), CLASSES, 0.1, transpose_crops=True)
        value = loss(Heads(cls, tokens), Targets(made.cls, made.tokens))["loss"]
        value.backward()
        return value

    sides_ = {"official": official, "sparse": lambda: ours(sparse_token_targets), "dense": lambda: ours(token_targets)}
    results, gradients = {}, {}
    for name, step in sides_.items():
        cls.grad = tokens.grad = None
        results[name], gradients[name] = step().item(), tokens.grad
    seconds: dict[str, list[float]] = {name: [] for name in sides_}
    for round_ in range(-2, options.rounds):  # the first two warm up
        for name, step in sides_.items():
            cls.grad = tokens.grad = None
            started = time.perf_counter()
            step()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    memory = {}
    for name, step in sides_.items():
        cls.grad = tokens.grad = None
        memory[name] = extra_memory(step) / 2**20

    table = Table(title=f"batch {batch}, {CLASSES} classes, {GRID} x {GRID} tokens, one thread")
    for column in (
        "targets + loss + backward",
        "ms",
        "of official",
        "extra MB",
        "of official",
        "loss",
        "gradient off by",
    ):
        table.add_column(column, justify="right")
    reference = gradients["official"]
    for name in sides_:
        ratio = statistics.median(own / other for own, other in zip(seconds[name], seconds["official"], strict=True))
        off = float((gradients[name] - reference).abs().max() / reference.abs().max())
        table.add_row(
            *(name, f"{1e3 * statistics.median(seconds[name]):.0f}", f"{ratio:.3f}", f"{memory[name]:.0f}"),
            *(f"{memory[name] / memory['official']:.3f}", f"{results[name]:.6f}", f"{off:.1e}"),
        )
    get_console().print(table)


if __name__ == "__main__":
    main()
