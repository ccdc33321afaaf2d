"""Measure the file index of a large data set: the time to build and to open it, and the memory of a loader worker.

- A tree of empty files (100,000 in 100 folders by default): the time to list it, and to open the cached list.
- A cached list of 14 million files in the 21,841 folders of ImageNet-21k (the folders exist and are checked): the time
  to open it, the time to look up one path, and the private memory of a worker after reading 100,000 random paths.

Command: python benchmarks/file_index.py [--files 1280000] [--json FILE]
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import add_json, write_figures

from vitrail.data.sources.index import FileIndex

FILES, FOLDERS = 14_197_122, 21_841  # ImageNet-21k
READS = 100_000


def own_memory() -> int:
    """Return the private memory of this process in KiB: pages that it has changed and that belong to no file."""
    total, is_file = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):  # header of a mapping: addresses, rights, offset, device, inode, name
                is_file = words[4] != "0"
            elif words[0] == "Private_Dirty:" and not is_file:
                total += int(words[1])
    return total


def settle(root: Path) -> None:
    """Set the modification time of every folder to one hour ago: the index does not trust fresh folders."""
    then = time.time() - 3600
    for entry in os.scandir(root):
        os.utime(entry.path, (then, then))


def measure_tree(folder: Path, files: int) -> dict[str, float]:
    """Measure listing a real tree, and opening the cached list."""
    classes = [f"n{number:08d}" for number in range(100)]
    for name in classes:
        (folder / "tree" / name).mkdir(parents=True)
        for number in range(files // 100):
            (folder / "tree" / name / f"{name}_{number}.JPEG").touch()
    settle(folder / "tree")
    started = time.perf_counter()
    FileIndex(folder / "tree", classes, folder / "cache")
    listed = time.perf_counter() - started
    started = time.perf_counter()
    index = FileIndex(folder / "tree", classes, folder / "cache")
    opened = time.perf_counter() - started
    print(f"{len(index):,} files: listed and cached in {listed:.2f} s, opened in {1e3 * opened:.1f} ms")
    return {"tree_listed_s": listed, "tree_opened_ms": 1e3 * opened}


def measure_list(folder: Path) -> dict[str, float]:
    """Measure a list of 14 million files."""
    classes = [f"n{number:08d}" for number in range(FOLDERS)]
    for name in classes:
        (folder / "large" / name).mkdir(parents=True)
    settle(folder / "large")
    index = FileIndex(folder / "large", classes)
    index.counts = np.diff(np.linspace(0, FILES, FOLDERS + 1).astype(np.int64))
    names = [
        f"n{number:08d}_{count}.JPEG".encode() for number, size in enumerate(index.counts) for count in range(size)
    ]
    index.names = np.frombuffer(b"".join(names), np.uint8)
    index.ends = np.cumsum([len(name) for name in names])
    index._keep(index._folder(folder / "cache"))
    del index, names
    context = multiprocessing.get_context("spawn")
    figures = context.Queue()
    process = context.Process(target=_use, args=(folder, classes, figures))
    process.start()
    process.join()
    return figures.get(timeout=10) | figures.get(timeout=10)


def _use(folder: Path, classes: list[str], figures: Any) -> None:
    started = time.perf_counter()
    index = FileIndex(folder / "large", classes, folder / "cache")
    opened = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    print(
        f"{len(index):,} files in {len(classes):,} folders: {size / 2**20:.0f} MiB on disk, opened in {opened:.2f} s",
        flush=True,
    )
    figures.put({"list_opened_s": opened, "list_mib": size / 2**20})
    worker = multiprocessing.get_context("fork").Process(
        target=_read, args=(index, figures)
    )  # as loader workers are started
    worker.start()
    worker.join()


def _read(index: FileIndex, figures: Any) -> None:
    wanted = [random.randrange(len(index)) for _ in range(READS)]
    before, started = own_memory(), time.perf_counter()
    for number in wanted:
        index.path(number)
    each = (time.perf_counter() - started) / READS
    private = (own_memory() - before) / 1024
    print(f"a worker: {1e6 * each:.1f} us per path, {private:.1f} MiB private after {READS:,}")
    figures.put({"worker_path_us": 1e6 * each, "worker_mib": private})


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="number of files in the tree")
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_tree(Path(folder), options.files) | measure_list(Path(folder))
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
