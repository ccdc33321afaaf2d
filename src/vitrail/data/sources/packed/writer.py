"""Write a pack, resumably and from several processes.

The images of a split are divided among data files of equal numbers of images. A data file is written under a temporary
name and renamed; then its index is written the same way. Data files with an index are kept when the same command runs
again, all others are written anew.

Shapes: N images of a split.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrail.data.sampling import sample_of
from vitrail.data.sources.contract import Source, Split, SplitName, splits_of
from vitrail.data.sources.packed.files import file_hash, gib, text_hash, writing
from vitrail.data.sources.packed.options import PackOptions, Stored
from vitrail.data.sources.tables import Strings, Table
from vitrail.data.writing import write_atomically
from vitrail.errors import ConfigError, ImageError

FORMAT = 1
SHARD_IMAGES = 4096  # images per data file, unless there would be too many files
_SHARDS = 256
_SAMPLE = 32  # images that are stored to estimate the size of a split
_TABLE_BYTES = 96  # bytes per image in the table, with a key of usual length
_RESERVE = 1.05


class Shard(NamedTuple):
    """One data file: images `first` to `last` - 1 of a split."""

    split: SplitName
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of the file without extension."""
        return f"{self.number:05d}"


class PackWriter:
    """Writer of one pack; each process has its own.

    Args:
        out: folder of the pack.
        source: the data set.
        options: what is stored of each image.
        verify: decode images whose file is copied unchanged, to find damaged ones.
        skip: leave out images that cannot be read, instead of stopping.
    """

    def __init__(
        self, out: Path, source: Source, options: PackOptions, verify: bool = True, skip: bool = False
    ) -> None:
        self.out, self.source, self.options, self.verify, self.skip = out, source, options, verify, skip
        self.splits: dict[SplitName, Split] = {name: source.open(name) for name in splits_of(source)}
        for name, split in self.splits.items():
            _check_labels(name, split, len(source.classes))

    def begin(self, shard_images: int | None) -> bool:
        """Create the folder or check that it contains the same pack; return whether the pack is finished.

        Args:
            shard_images: images per data file; None for the default.

        Raises:
            ConfigError: the folder contains something else, or cannot be written to.
        """
        description = self._describe(shard_images)
        for name in ("manifest.json", "begun.json"):
            if (self.out / name).is_file():
                found = json.loads((self.out / name).read_text(encoding="utf-8"))
                self._check_same(found.get("begun", found), description, shard_images)
                return name == "manifest.json"
        if self.out.is_dir() and any(entry.name != ".lock" for entry in self.out.iterdir()):
            raise ConfigError(f"out={self.out}: contains other files; choose an empty or new folder.")
        with writing(self.out):
            for split in self.splits:
                (self.out / split).mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / "begun.json", json.dumps(description, indent=1).encode())
        return False

    def _describe(self, shard_images: int | None) -> dict[str, Any]:
        """Describe the pack; two commands with the same description write the same pack."""
        value_range = getattr(self.source, "value_range", None)
        return {
            "format": FORMAT,
            "options": self.options.saved(),
            "classes": list(self.source.classes),
            "value_range": None if value_range is None else list(value_range),
            "splits": {
                name: {
                    "images": len(split),
                    "shard_images": shard_images or max(SHARD_IMAGES, -(-len(split) // _SHARDS)),
                    "keys_sha256": text_hash(split.keys()),
                    "labels_sha256": hashlib.sha256(np.asarray(split.labels, np.int64).tobytes()).hexdigest(),
                }
                for name, split in self.splits.items()
            },
        }

    def _check_same(self, found: dict[str, Any], asked: dict[str, Any], shard_images: int | None) -> None:
        """Raise an error if the folder contains a pack of another description, by what is different."""
        before, now = dict(found["options"]), dict(asked["options"])
        for split in found["splits"].values():
            before["shard_images"] = split.pop("shard_images")
            now["shard_images"] = before["shard_images"] if shard_images is None else shard_images
        for split in asked["splits"].values():
            split.pop("shard_images")
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"out={self.out}: contains a pack with {key}={before.get(key)}, not {key}={now.get(key)}; choose"
                    " another folder."
                )
        if found["classes"] != asked["classes"]:
            raise ConfigError(f"out={self.out}: contains a pack of other classes; choose another folder.")
        if found["splits"] != asked["splits"] or found["value_range"] != asked["value_range"]:
            raise ConfigError(
                f"out={self.out}: contains a pack of other data, or the data has changed since; choose another folder,"
                " or remove this one."
            )

    @property
    def begun(self) -> dict[str, Any]:
        """Description of the pack, as written by `begin`."""
        begun: dict[str, Any] = json.loads((self.out / "begun.json").read_text(encoding="utf-8"))
        return begun

    def shards(self) -> list[Shard]:
        """Return all data files of the pack."""
        about, shards = self.begun["splits"], []
        for name, split in self.splits.items():
            step = about[name]["shard_images"]
            for number, first in enumerate(range(0, len(split), step)):
                shards.append(Shard(name, number, first, min(first + step, len(split))))
        return shards

    def is_done(self, shard: Shard) -> bool:
        """Return whether a data file is completely written."""
        return (self.out / shard.split / f"{shard.name}.npz").is_file()

    def check_space(self, shards: Sequence[Shard]) -> None:
        """Check that the disk has room for data files, from a sample of their images.

        Raises:
            ConfigError: there is too little space; the message states how much is needed.
        """
        needed = 0.0
        for name, split in self.splits.items():
            images = np.concatenate([[], *(np.arange(s.first, s.last) for s in shards if s.split == name)]).astype(int)
            sizes = []
            for place in sample_of(len(images), _SAMPLE) if len(images) else []:
                try:
                    sizes.append(len(self.options.store(split, int(images[place]), verify=False).data))
                except ImageError:
                    continue
            needed += len(split) * _TABLE_BYTES + (sum(sizes) / len(sizes) * len(images) if sizes else 0)
        needed *= _RESERVE
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise ConfigError(
                f"out={self.out}: has {gib(free)} free, but the pack needs about {gib(needed)}. Free some space, or"
                " choose a folder on another disk."
            )

    def write(self, shard: Shard, count: Callable[[int], None] = lambda _: None) -> None:
        """Write a data file and its index.

        Args:
            shard: the data file.
            count: called with 1 after each image.

        Raises:
            ImageError: an image cannot be read and `skip` is not set.
            ConfigError: the disk is full, or the folder cannot be written to.
        """
        folder = self.out / shard.split
        skipped: list[str] = []
        kept: list[int] = []
        sizes: list[int] = []
        shapes: list[tuple[int, int]] = []
        digest = hashlib.sha256()
        unfinished = folder / f".{shard.name}.bin.{os.getpid()}"
        with writing(self.out):
            for leftover in folder.glob(f".{shard.name}.*"):
                leftover.unlink(missing_ok=True)
            with unfinished.open("wb") as file:
                for index in range(shard.first, shard.last):
                    stored = self._store(shard.split, index, skipped)
                    if stored is not None:
                        file.write(stored.data)
                        digest.update(stored.data)
                        kept.append(index)
                        sizes.append(len(stored.data))
                        shapes.append(stored.shape)
                    count(1)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(folder / f"{shard.name}.bin")
            index_file = folder / f".{shard.name}.npz"
            with index_file.open("wb") as file:
                np.savez(
                    file,
                    kept=np.array(kept, np.int64),
                    sizes=np.array(sizes, np.int64),
                    shapes=np.array(shapes, np.int32).reshape(-1, 2),
                    sha256=np.array(digest.hexdigest()),
                    skipped=np.array(skipped, np.str_),
                )
                file.flush()
                os.fsync(file.fileno())
            index_file.replace(folder / f"{shard.name}.npz")

    def _store(self, split: SplitName, index: int, skipped: list[str]) -> Stored | None:
        try:
            return self.options.store(self.splits[split], index, self.verify)
        except ImageError as error:
            if not self.skip:
                raise
            skipped.append(str(error))
            return None

    def finish(self) -> None:
        """Write the tables and, last, the manifest.

        Raises:
            ConfigError: a data file is missing, no image of a split could be read, or the disk is full.
        """
        shards, skipped = self.shards(), []
        manifest: dict[str, Any] = {"format": FORMAT, "begun": self.begun, "splits": {}}
        with writing(self.out):
            for name, split in self.splits.items():
                own = [shard for shard in shards if shard.split == name]
                indices = [self._index(shard) for shard in own]
                table = self._table(split, indices)
                if not len(table):
                    raise ConfigError(f"data: no image of the {name} split can be read; see {self.out}/skipped.txt.")
                table.save(self.out / name)
                files = [(f"{s.name}.bin", str(i["sha256"])) for s, i in zip(own, indices, strict=True)]
                files += [(f"{column}.npy", file_hash(self.out / name / f"{column}.npy")) for column in table.arrays]
                skipped += [str(line) for index in indices for line in index["skipped"]]
                manifest["splits"][name] = {
                    "images": len(table),
                    "skipped": len(split) - len(table),
                    "data_files": len(own),
                    "columns": list(table.arrays),
                    "files": [
                        {"name": file, "bytes": (self.out / name / file).stat().st_size, "sha256": digest}
                        for file, digest in files
                    ],
                }
            if skipped:
                write_atomically(self.out / "skipped.txt", "".join(f"{line}\n" for line in skipped).encode())
            write_atomically(self.out / "manifest.json", json.dumps(manifest, indent=1).encode())
            for shard in shards:
                (self.out / shard.split / f"{shard.name}.npz").unlink()
            (self.out / "begun.json").unlink()

    def _index(self, shard: Shard) -> dict[str, NDArray[Any]]:
        path = self.out / shard.split / f"{shard.name}.npz"
        if not path.is_file():
            raise ConfigError(f"{path}: is missing; run the same command again to resume.")
        with np.load(path) as file:
            return dict(file)

    def _table(self, split: Split, indices: Sequence[dict[str, NDArray[Any]]]) -> Table:
        """Return the table of a split from the indices of its data files."""
        kept = np.concatenate([index["kept"] for index in indices])
        keys = split.keys()
        strings = Strings.of(keys if len(kept) == len(keys) else (keys[int(index)] for index in kept))
        starts = [np.cumsum(index["sizes"]) - index["sizes"] for index in indices]
        counts = [len(index["sizes"]) for index in indices]
        arrays = {
            "file": np.repeat(np.arange(len(indices), dtype=np.int32), counts),
            "offset": np.concatenate(starts).astype(np.int64),
            "size": np.concatenate([index["sizes"] for index in indices]),
            "label": np.asarray(split.labels, np.int64)[kept],
            "key_text": strings.text,
            "key_ends": strings.ends,
        }
        if self.options.format == "raw":
            arrays["shape"] = np.concatenate([index["shapes"] for index in indices])
        if (sets := getattr(split, "label_sets", None)) is not None:
            chosen = [sets[int(index)] for index in kept]
            arrays["set_labels"] = np.array([label for labels in chosen for label in labels] or [-1], np.int32)
            arrays["set_ends"] = np.cumsum([len(labels) for labels in chosen], dtype=np.int64)
        return Table(arrays)


def _check_labels(name: str, split: Split, num_classes: int) -> None:
    """Raise an error if the images of a split have no labels, or labels outside of the classes."""
    labels = getattr(split, "labels", None)
    if labels is None or len(labels) != len(split):
        raise ConfigError(f"data.source: its {name} split has no labels; a pack needs a class for every image.")
    if len(labels) and (int(np.min(labels)) < 0 or int(np.max(labels)) >= num_classes):
        raise ConfigError(
            f"data.source: labels of its {name} split reach from {np.min(labels)} to {np.max(labels)}, but there are"
            f" {num_classes} classes; a pack needs a class for every image."
        )
