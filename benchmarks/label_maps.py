"""Measure reading and importing label maps, compared with the published files.

- Reading a map by key and by index from stores of 10,000 and 1.28 million images, compared with `torch.load` of a
  published file. Before every 100 reads, 64 MB of other memory are read, as image decoding does in a training;
  otherwise the small store would fit into the CPU cache.
- Importing files of the published format, in files per second.
- Opening a store of 14 million images and reading one map.

The stores are synthetic; measurements are interleaved in one process.

Command: python benchmarks/label_maps.py [--rounds 40] [--json FILE]
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import add_json, write_figures

from vitrail.data.label_maps import LabelMapStore

SIZES = (10_000, 1_280_000)
READS = 100
OTHER = np.zeros(64 * 2**20, np.uint8)


def key_of(index: int) -> str:
    """Return a key like those of ImageNet."""
    return f"n{index % 1000:08d}/n{index % 1000:08d}_{index}"


def synthetic(path: Path, images: int, top_k: int, grid: tuple[int, int]) -> LabelMapStore:
    """Return a store whose maps are holes in a sparse file."""
    writer = LabelMapStore.create(path, images, top_k, grid, 1000, [key_of(index) for index in range(images)])
    writer.done[:] = True
    return writer.finish()


def microseconds(read: Callable[[Any], Any], wanted: list[Any]) -> float:
    """Return the microseconds per read, with cold caches."""
    OTHER.sum()
    started = time.perf_counter()
    for item in wanted:
        read(item)
    return (time.perf_counter() - started) / len(wanted) * 1e6


def measure_reads(folder: Path, published: Path, rounds: int) -> dict[str, float]:
    """Print and return the median microseconds of a read; print the speed-up over the published file."""
    stores = {images: synthetic(folder / str(images), images, 5, (14, 14)) for images in SIZES}
    random.seed(0)
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        found = {"torch.load of a published file": microseconds(lambda path: torch.load(path), [published] * READS)}
        for images, store in stores.items():
            indices = [random.randrange(images) for _ in range(READS)]
            found[f"{images:,} images, by index"] = microseconds(store.__getitem__, indices)
            found[f"{images:,} images, by key"] = microseconds(store.__getitem__, [key_of(index) for index in indices])
        for name, value in found.items() if number else ():
            times.setdefault(name, []).append(value)
    slowest = statistics.median(times["torch.load of a published file"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:<32} {median:7.1f} us  {slowest / median:5.1f} times faster")
    return {f"{name} (us)": median for name, median in medians.items()}


def measure_import(folder: Path, published: Path, files: int = 10_000) -> float:
    """Print and return the number of files imported per second of CPU time."""
    content = published.read_bytes()
    for index in range(files):
        path = folder / "published" / f"{key_of(index)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    started = time.process_time()
    LabelMapStore.import_official(folder / "published", folder / "imported")
    per_second = files / (time.process_time() - started)
    print(f"imported: {per_second:,.0f} files per second of CPU time")
    return per_second


def measure_open(folder: Path, images: int = 14_000_000) -> float:
    """Print and return the milliseconds to open a large store and read one map."""
    synthetic(folder / "large", images, 1, (2, 2))
    started = time.perf_counter()
    LabelMapStore.open(folder / "large")[key_of(7)]
    milliseconds = 1000 * (time.perf_counter() - started)
    print(f"{images:,} images: opened and one map read in {milliseconds:.1f} ms")
    return milliseconds


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="rounds, after one warm-up round")
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores, classes = torch.randn(5, 14, 14), torch.randint(0, 1000, (5, 14, 14))
        torch.save(torch.stack((scores, classes)).half(), folder / "map.pt")
        figures = measure_reads(folder, folder / "map.pt", options.rounds)
        figures["imported files per CPU second"] = measure_import(folder, folder / "map.pt")
        figures["open 14 million (ms)"] = measure_open(folder)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
