"""Annotate: write label maps for every image of a split, with one or several processes; it can be interrupted."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.dataset import ViewDataset, collate
from vitrail.data.label_maps import LabelMapStore, LabelMapWriter
from vitrail.data.label_maps.checks import measure_agreement
from vitrail.data.sampling import Draw
from vitrail.data.sources import Split
from vitrail.errors import ConfigError
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.reporting.annotation import annotation_report
from vitrail.reporting.label_maps import preview
from vitrail.runs.config import instantiate, plain
from vitrail.runs.keys import check_choices, check_keys
from vitrail.runs.logs import set_up_logging
from vitrail.runs.processes import run_processes
from vitrail.types import IGNORE, InputSpec

log = logging.getLogger(__name__)

_CHOICES = {
    "split": ("train", "val"),
    "crop": ("whole", "official"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", "fp16"),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def annotate(config: DictConfig) -> LabelMapStore:
    """Write the label maps that `config` describes, or the missing ones; print a summary and draw the preview.

    Raises:
        ConfigError: a setting is invalid.
    """
    set_up_logging()
    check_keys(config, "annotate")
    check_choices(config, _CHOICES)
    out = Path(config.out).expanduser()
    if config.import_from is not None:
        store = LabelMapStore.import_official(Path(config.import_from).expanduser(), out)
        get_console().print(annotation_report(store, None, []), soft_wrap=True)
        return store
    job = Job.build(plain(config))
    _log_class_match(job)
    data, split = job.data, job.split
    names = list(job.data.classes) if job.chosen is not None else job.annotator.classes
    num_classes = len(names) if names is not None else job.annotator.num_classes
    if config.top_k < 1 or config.top_k > num_classes:
        raise ConfigError(f"top_k={config.top_k}: must lie between 1 and the {num_classes} classes.")
    about = job.describe(names)
    if (out / "manifest.json").exists():
        store = LabelMapStore.open(out)
        asked = (about, len(split), config.top_k, job.grid or store.grid)
        if (store.about, len(store), store.top_k, store.grid) != asked:
            raise ConfigError(f"out={out}: contains finished label maps with other settings; choose another folder.")
        log.info("%s is already finished", out)
    else:
        rows, columns = job.grid or job.scores(torch.zeros(1, 3, *job.annotator.image_size)).shape[-2:]
        writer = LabelMapStore.create(
            out, len(split), config.top_k, (rows, columns), num_classes, split.keys(), **about
        )
        _fill(job, writer, out)
        store = writer.finish()
    agreement = None
    if num_classes == data.num_classes and names in (None, list(data.classes)):
        records = np.arange(len(split))
        agreement = measure_agreement(store, records, np.asarray(split.labels), num_classes)
    get_console().print(annotation_report(store, agreement, data.classes), soft_wrap=True)
    if config.preview:
        classes = data.classes if agreement else None
        picture = preview(store, split, int(config.preview), classes, data.hflip)
        picture.save(out / "preview.png")
        log.info("preview: %s", out / "preview.png")
    return store


class Job(NamedTuple):
    """Annotator and data of one process, built from the config."""

    config: dict[str, Any]
    annotator: PretrainedClassifier
    data: ImageDataModule
    split: Split
    chosen: list[int] | None  # annotator's classes to store, in the data's order; None: all

    @classmethod
    def build(cls, config: dict[str, Any]) -> "Job":
        """Build annotator and data, and match their classes by name."""
        annotator = instantiate(config["annotator"], "annotator")
        data = instantiate(config["data"], "data", augment=Augmentation())
        data.prepare_data()
        return cls(config, annotator, data, data.source.open(config["split"]), annotator.matching(data.classes))

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns that the config sets; None for the annotator's."""
        grid = self.config["grid"]
        if grid is None:
            return None
        return grid[0], grid[1]

    @torch.inference_mode()
    def scores(self, images: Tensor) -> Tensor:
        """Return raw scores (B, C, h, w) of the chosen classes in h x w cells, for images (B, 3, H, W)."""
        dtype = _DTYPES.get(self.config["precision"])
        with torch.autocast(images.device.type, dtype) if dtype else nullcontext():
            scores = self.annotator(images, self.grid, self.config["flip"]).float()
        return scores if self.chosen is None else scores[:, self.chosen]

    def describe(self, names: list[str] | None) -> dict[str, Any]:
        """Return the metadata of these maps for the manifest."""
        whole = self.config["crop"] == "whole"
        return {
            "annotator": self.annotator.name,
            "weights_sha256": self.annotator.weights_sha256(),
            "image_size": list(self.annotator.image_size),
            "mean": list(self.annotator.mean),
            "std": list(self.annotator.std),
            "interpolation": self.annotator.interpolation,
            "coverage": "whole image" if whole else "center square",
            "flip": self.config["flip"],
            "precision": self.config["precision"],
            "split": self.config["split"],
            "class_names": names,
        }


def _log_class_match(job: Job) -> None:
    """Log how the annotator's classes match the data's, if they are not the same."""
    known, count = job.annotator.classes, job.data.num_classes
    if job.chosen is not None:
        log.info("storing the data's %d classes out of the annotator's %d", count, job.annotator.num_classes)
    elif known is None and job.annotator.num_classes == count:
        log.warning("the annotator's classes have no names; assuming the data's classes in the data's order")
    elif known != list(job.data.classes):
        log.warning(
            "the annotator's %d classes are not the data's %d: these maps are for viewing only, not for training",
            job.annotator.num_classes,
            count,
        )


def _fill(job: Job, writer: LabelMapWriter, out: Path) -> None:
    """Write all missing records, and show the progress."""
    todo = np.flatnonzero(writer.done == 0)
    devices = _devices(job.config)
    parts = [part for part in np.array_split(todo, len(devices)) if len(part)]
    log.info(
        "%s at %d x %d pixels, %d x %d cells, top %d: %d of %d images to annotate on %s",
        job.annotator.name,
        *job.annotator.image_size,
        *writer.layout.shape[1:],
        writer.layout.shape[0],
        len(todo),
        writer.num_samples,
        ", ".join(devices),
    )
    columns = (TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn())
    started, finished_before = time.monotonic(), writer.num_samples - len(todo)
    with Progress("annotating", BarColumn(), MofNCompleteColumn(), *columns, console=get_console()) as progress:
        bar = progress.add_task("", total=writer.num_samples, completed=finished_before, speed="")

        def show() -> None:
            done = int(np.count_nonzero(writer.done))
            speed = (done - finished_before) / max(time.monotonic() - started, 1e-9)
            progress.update(bar, completed=done, speed=f"{speed:,.1f} images/s")

        if len(parts) == 1:
            for _ in _annotate(job, writer, parts[0], devices[0], out):
                show()
        elif parts:
            run_processes(_process, (job.config, parts, devices), len(parts), show)
    if len(todo):
        seconds = time.monotonic() - started
        log.info("%d images in %.1f s, %.1f images/s", len(todo), seconds, len(todo) / seconds)


def _devices(config: dict[str, Any]) -> list[str]:
    """Return the device of each process."""
    gpus = torch.cuda.device_count() if config["device"] in ("auto", "cuda") else 0
    if config["device"] == "cuda" and not gpus:
        raise ConfigError("device=cuda: PyTorch sees no GPU here; use device=cpu.")
    count = config["processes"] or max(gpus, 1)
    return [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(count)]


def _annotate(
    job: Job, writer: LabelMapWriter, records: NDArray[np.int64], device: str, out: Path, processes: int = 1
) -> Iterator[int]:
    """Write the maps of some records batch by batch, and yield the size of each batch."""
    annotator, config = job.annotator, job.config
    cropping = "squash" if config["crop"] == "whole" else "center"
    options: dict[str, Any] = {"crop_mode": cropping, "eval_interpolation": annotator.interpolation}
    augmentation = Augmentation(crop_pct=1.0, **options)
    transform = augmentation.evaluation(InputSpec(annotator.image_size, annotator.mean, annotator.std))
    skipped = out / "skipped.txt" if config["data"].get("on_corrupt") == "skip" else None
    dataset = ViewDataset(job.split, transform, None, skipped, fill=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config["num_workers"]
    loader = DataLoader(
        dataset,
        batch_size=config["batch_size"],
        sampler=[Draw(int(record), 0, False) for record in records],
        num_workers=min(8, cores // processes) if workers is None else workers,
        pin_memory=device != "cpu",
        collate_fn=collate,
    )
    annotator.to(device)
    start, top_k = 0, writer.layout.shape[0]
    for batch in loader:
        best = job.scores(batch.image.to(device, non_blocking=True)).topk(top_k, dim=1)
        scores, classes = best.values.clamp(-65504, 65504).half().cpu().numpy(), best.indices.cpu().numpy()
        unreadable = (batch.label == IGNORE).numpy()  # these records stay empty; training skips the images too
        scores[unreadable] = 0
        if not np.isfinite(scores).all():
            raise ConfigError(
                f"precision={config['precision']}: the annotator's scores are not finite; try precision=fp32 or bf16."
            )
        for offset, record in enumerate(records[start : start + len(scores)]):
            writer.write(int(record), scores[offset], classes[offset])
        start += len(scores)
        yield len(scores)


def _process(number: int, config: dict[str, Any], parts: list[NDArray[np.int64]], devices: list[str]) -> None:
    """Write the part of one of several processes."""
    if devices[number] == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // len(parts)))
    job = Job.build(config)
    out = Path(config["out"]).expanduser()
    writer = LabelMapWriter.join(out)
    if len(job.split) != writer.num_samples:
        raise ConfigError(
            f"data.root: contains {len(job.split)} images, but {writer.num_samples} when the job started; do not change"
            " it while annotating."
        )
    for _ in _annotate(job, writer, parts[number], devices[number], out, len(parts)):
        pass
