"""Pack: copy a data set into a few large files, with one or several processes; it can be interrupted."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import multiprocessing

from vitrail.data.sources.packed import Packed, PackOptions, PackWriter
from vitrail.data.sources.packed.files import writing
from vitrail.data.sources.packed.writer import Shard
from vitrail.errors import ConfigError
from vitrail.reporting.tables import pack_report
from vitrail.runs.config import instantiate, plain
from vitrail.runs.directory import locked
from vitrail.runs.keys import check_choices, check_keys
from vitrail.runs.logs import set_up_logging
from vitrail.runs.processes import run_processes

log = logging.getLogger(__name__)

_FEW = 1000  # images for which one more process takes longer to start than to work


def pack(config: DictConfig) -> Packed:
    """Write the pack that `config` describes, or the missing part of it; print a summary and return the pack.

    Raises:
        ConfigError: a setting is invalid, the data cannot be read, or the folder cannot be written to.
    """
    set_up_logging()
    check_keys(config, "pack")
    check_choices(config, {"format": ("jpeg", "raw")})
    if config.quality != 90 and (config.format == "raw" or config.size == "original"):
        log.warning("quality=%d has no effect: only resized images of format=jpeg are encoded again", config.quality)
    out = Path(config.out).expanduser().absolute()
    settings = _settings(config)
    writer = _writer(settings, prepare=True)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        if not locked(lock):
            raise ConfigError(f"out={out}: another process is packing there; wait until it ends.")
        if writer.begin(config.shard_images):
            log.info("%s is already finished", out)
        else:
            _fill(settings, writer, config.processes)
            writer.finish()
    packed = Packed(str(out))
    get_console().print(pack_report(out, packed.manifest, packed.describe()), soft_wrap=True)
    return packed


def _settings(config: DictConfig) -> dict[str, Any]:
    """Return what a process needs to build the writer, as plain values."""
    if "source" not in config.data:
        raise ConfigError("data: has no source; choose data=imagefolder, imagenet, webdataset, ... with data.root=...")
    return {
        "source": plain(config.data.source),
        "out": str(Path(config.out).expanduser().absolute()),
        "options": (None if config.size == "original" else int(config.size), config.format, config.quality),
        "verify": config.verify,
        "skip": config.data.get("on_corrupt") == "skip",
    }


def _writer(settings: dict[str, Any], prepare: bool = False) -> PackWriter:
    source = instantiate(settings["source"], "data.source")
    if prepare:
        source.prepare()
    options = PackOptions(*settings["options"])
    return PackWriter(Path(settings["out"]), source, options, settings["verify"], settings["skip"])


def _fill(settings: dict[str, Any], writer: PackWriter, processes: int | None) -> None:
    """Write all missing data files, and show the progress."""
    shards = writer.shards()
    todo = [shard for shard in shards if not writer.is_done(shard)]
    writer.check_space(todo)
    images, left = (sum(shard.last - shard.first for shard in some) for some in (shards, todo))
    processes = min(processes or min(_cores(), 1 + left // _FEW), len(todo))
    log.info("%d of %d images to pack into %d of %d files", left, images, len(todo), len(shards))
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    columns = (TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress("packing", BarColumn(), MofNCompleteColumn(), *columns, console=get_console()) as progress:
        bar = progress.add_task("", total=images, completed=images - left, speed="")

        def show() -> None:
            speed = counter.value / max(time.monotonic() - started, 1e-9)
            progress.update(bar, completed=images - left + counter.value, speed=f"{speed:,.0f} images/s")

        if processes > 1:
            parts = [todo[number::processes] for number in range(processes)]
            run_processes(_process, (settings, parts, counter), processes, show)
        else:
            for shard in todo:
                writer.write(shard, lambda _: _count(counter, show))
    if left:
        seconds = time.monotonic() - started
        log.info("%d images in %.1f s, %.0f images/s", left, seconds, left / seconds)


def _count(counter: Any, show: Any = None) -> None:
    with counter.get_lock():
        counter.value += 1
    if show is not None and counter.value % 64 == 0:
        show()


def _process(number: int, settings: dict[str, Any], parts: list[list[Shard]], counter: Any) -> None:
    """Write the data files of one of several processes."""
    writer = _writer(settings)
    for shard in parts[number]:
        writer.write(shard, lambda _: _count(counter))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
