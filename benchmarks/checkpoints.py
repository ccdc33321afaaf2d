"""How long a training waits for a checkpoint that a thread writes, against one that it writes itself.

Weights, average and AdamW's moments of ViT-B/16, in turns within one process; the disk's speed is part of both.

Command: python benchmarks/checkpoints.py [--rounds 5] [--folder /where/runs/are]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch

from vitrail.checkpoints.writing import AtomicCheckpointIO


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary one otherwise")
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
    beside, itself = (statistics.median(each) for each in waits)
    print(f"{size:.2f} GiB: waits {beside:.2f} s while a thread writes, {itself:.2f} s for all of it (medians)")


if __name__ == "__main__":
    main()
