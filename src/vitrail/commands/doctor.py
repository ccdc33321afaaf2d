"""Doctor: check a data set and its label maps for problems before training."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich import get_console

from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.images import size_of
from vitrail.data.label_maps import LabelMapStore
from vitrail.data.label_maps.checks import (
    Finding,
    check_agreement,
    check_coverage,
    check_keys_match,
    check_names,
    check_parts,
    check_values,
    measure_agreement,
)
from vitrail.data.sampling import sample_of
from vitrail.data.segmentation.checks import check_masks
from vitrail.data.sources import Split, splits_of
from vitrail.data.sources.files import describe_ignored
from vitrail.errors import ConfigError, ImageError
from vitrail.reporting.segmentation import overlays
from vitrail.reporting.tables import findings_table
from vitrail.runs.config import instantiate
from vitrail.runs.keys import check_keys
from vitrail.runs.logs import set_up_logging
from vitrail_runtime.allowed_targets import resolve_target

_DRAWN = 8  # images of each split in the picture of overlays
_FLAT = 2.0  # standard deviation of an image that is nearly one colour, in grey levels of 255


def examine(config: DictConfig) -> bool:
    """Print the findings about the data of `config`, and return whether there are no errors.

    Raises:
        ConfigError: a key is unknown.
    """
    set_up_logging()
    check_keys(config, "doctor")
    findings = list(_findings(config))
    get_console().print(findings_table(findings))
    return all(finding.level != "error" for finding in findings)


def _findings(config: DictConfig) -> Iterator[Finding]:
    try:
        has_masks = getattr(resolve_target(str(config.data.get("_target_"))), "has_masks", False)
        augment = {} if has_masks else {"augment": Augmentation()}
        data: ImageDataModule = instantiate(config.data, "data", **augment)
        data.prepare_data()
        splits: dict[str, Split] = {name: data.source.open(name) for name in splits_of(data.source)}
    except ConfigError as error:
        yield Finding("folders", "error", str(error), "fix the folders or the config key in the message")
        return
    counts = ", ".join(f"{len(split):,} {name} images" for name, split in splits.items())
    yield Finding("folders", "ok", f"{counts} of {data.num_classes} classes")
    if not has_masks and "train" in splits:
        yield _balance(splits["train"], data.classes)
        yield _overlap(splits)
    if config.checksums and hasattr(data.source, "damaged"):
        yield _stored_files(list(data.source.damaged()))
    yield from _ignored(splits)
    shapes: Counter[bool] = Counter()
    for name, split in splits.items():
        yield from _images(name, split, config.sample, shapes)
    if (value_range := data.input.value_range) is not None:
        text = f"images with more than 8 bits per channel: {value_range[0]:g} is black, {value_range[1]:g} is white"
        yield Finding("value range", "ok", text)
    if has_masks:
        yield from _masks(data, splits, config)
    elif data.label_maps is not None and "train" in splits:
        yield from _label_maps(data, splits["train"], config, shapes[False] / max(shapes.total(), 1))


def _masks(data: ImageDataModule, splits: dict[str, Split], config: DictConfig) -> Iterator[Finding]:
    """Check images with masks, and draw some."""
    for name, split in splits.items():
        yield from check_masks(name, split, data.source, config.sample)
    drawn = overlays(list(splits.values()), data.classes, _DRAWN)
    if drawn is not None:
        path = Path(config.paths.logs) / "doctor" / "overlays.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path)
        yield Finding("overlays", "ok", f"images with their masks are drawn in {path}", "look at them")


def _balance(split: Split, classes: list[str]) -> Finding:
    counts = np.bincount(split.labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    text = f"{counts[least]} images of {classes[least]} to {counts[most]} of {classes[most]}"
    if counts[most] > 20 * counts[least]:
        return Finding("balance", "warning", text, "expect low accuracy on the rare classes")
    return Finding("balance", "ok", text)


def _overlap(splits: dict[str, Split]) -> Finding:
    train, val = (set(splits[name].keys()) for name in ("train", "val"))
    if both := sorted(train & val):
        return Finding(
            "overlap",
            "warning",
            f"{len(both)} images have the same name in train and val, the first is {both[0]}",
            "if they are the same images, the validation accuracy is meaningless",
        )
    return Finding("overlap", "ok", "no image name occurs in both train and val")


def _stored_files(damaged: list[str]) -> Finding:
    """Report files whose checksum is wrong."""
    if damaged:
        text = f"{len(damaged)} damaged file{'s' * (len(damaged) > 1)}: {damaged[0]}"
        return Finding("checksums of the data", "error", text, "copy the files again")
    return Finding("checksums of the data", "ok", "all files are as they were written")


def _ignored(splits: dict[str, Split]) -> Iterator[Finding]:
    """Report files and folders that are not used as images."""
    for name, split in splits.items():
        if ignored := getattr(split, "ignored", None):
            advice = "convert them to a format that Pillow reads if they are images"
            yield Finding(f"{name} files", "ok", f"ignored: {describe_ignored(ignored)}", advice)


def _images(name: str, split: Split, sample: int, shapes: Counter[bool]) -> Iterator[Finding]:
    """Decode a sample of images, and count the square ones in `shapes`."""

    def look(index: int) -> tuple[tuple[int, int], float, str] | str:
        try:
            sample = split[index]
        except ImageError as error:
            return str(error)
        height, width = size_of(sample.image)
        return (width, height), float(np.asarray(sample.image, np.float32).std(axis=(0, 1)).max()), sample.key

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(look, map(int, sample_of(len(split), sample))))
    broken = [item for item in found if isinstance(item, str)]
    seen = [item for item in found if not isinstance(item, str)]
    sizes = [size for size, *_ in seen]
    shapes.update(width == height for width, height in sizes)
    if broken:
        text = f"{len(broken)} of {len(found)} sampled images cannot be used: {broken[0]}"
        yield Finding(f"{name} images", "error", text, "remove them, or set data.on_corrupt=skip")
        return
    sides = sorted(min(size) for size in sizes)
    text = f"{len(found)} decoded; shorter sides {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}"
    yield Finding(f"{name} images", "ok", text)
    if flat := [key for _, spread, key in seen if spread < _FLAT]:
        text = f"{len(flat)} of {len(found)} sampled images have one colour, or nearly so; the first is {flat[0]}"
        yield Finding(
            f"{name} contrast", "warning", text, "look at them; check data.value_range if they have many bits"
        )


def _label_maps(data: ImageDataModule, split: Split, config: DictConfig, oblong: float) -> Iterator[Finding]:
    try:
        store = LabelMapStore.open(Path(str(data.label_maps)))
    except ConfigError as error:
        yield Finding("label maps", "error", str(error), "run annotate.py, or set data.label_maps to the right folder")
        return
    yield Finding("label maps", "ok", f"{len(store):,} maps by {store.about.get('annotator', 'an unknown annotator')}")
    names = check_names(store, data.classes)
    yield names
    keys = split.keys()
    records = store.indices(keys)
    yield check_keys_match(store, keys, records)
    yield check_coverage(store, oblong)
    images = np.flatnonzero(records >= 0)
    images = images[sample_of(len(images), config.sample)]
    if len(images):
        yield check_values(store, records[images])
    if len(images) and store.num_classes == data.num_classes:
        agreement = measure_agreement(store, records[images], np.asarray(split.labels)[images], store.num_classes)
        yield check_agreement(agreement, data.classes)
    if config.checksums:
        yield from check_parts(store)
