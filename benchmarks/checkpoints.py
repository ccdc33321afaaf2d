"""Measure how long a training waits for a checkpoint: written by a background thread, or synchronously.

The checkpoint has the weights, EMA weights and AdamW moments of ViT-B/16. Both variants are interleaved in one process.
The disk's speed is part of both times.

Command: python benchmarks/checkpoints.py [--rounds 5] [--folder /where/runs/are] [--json FILE]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from figures import add_json, write_figures

from vitrail.checkpoints.writing import AtomicCheckpointIO


def main() -> None:
    """Measure both variants and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: temporary)")
    add_json(parser)
    options = parser.parse_args()
    weights = timm.create_model("vit_base_patch16_224").state_dict()
    copies = {name: {key: torch.randn_like(value) for key, value in weights.items()} for name in "abc"}
    checkpoint = {"state_dict": weights, **copies}
    waits: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "last.ckpt"
        for _ in range(options.rounds):
            for number in range(2):
                writer = AtomicCheckpointIO()
                started = time.perf_counter()
                writer.save_checkpoint(checkpoint, path)
                if number == 1:
                    writer.finish()
                waits[number].append(time.perf_counter() - started)
                writer.finish()
        size = path.stat().st_size / 2**30
    threaded, synchronous = (statistics.median(each) for each in waits)
    print(f"{size:.2f} GiB: waits {threaded:.2f} s with a background thread, {synchronous:.2f} s without (medians)")
    write_figures(options.json, {"gibibytes": size, "threaded_wait_s": threaded, "synchronous_wait_s": synchronous})


if __name__ == "__main__":
    main()
