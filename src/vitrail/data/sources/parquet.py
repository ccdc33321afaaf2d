"""Parquet files as the Hugging Face hub publishes them: a column of image files, and one of class indices.

Rows are read in groups, so evaluation and packing, which read in order, are fast. Training in random order reads a
whole group for each image: pack the data first.
"""

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from vitrail.data.bit_depth import ValueRange
from vitrail.data.sources.contract import Encoded, SplitName
from vitrail.data.sources.imagenet import synsets
from vitrail.data.sources.imagenet_names import check_wnid, imagenet_key
from vitrail.data.sources.table_sources import TableSource, TableSplit
from vitrail.data.sources.tables import Table, TableBuilder, cached
from vitrail.errors import ConfigError, ImageError
from vitrail_runtime.checking import Length, checked

log = logging.getLogger(__name__)

_GROUPS = 2  # groups of rows that a process keeps decoded


class ParquetSplit(TableSplit):
    """Split of images in parquet files.

    Args:
        paths: the files.
        table: group of rows (as `offset`) and row in it (as `size`) of each image, with labels and keys.
        column: column of the images.
        value_range: see `read_image`.
    """

    def __init__(self, paths: Sequence[Path], table: Table, column: str, value_range: ValueRange | None) -> None:
        super().__init__(table, value_range)
        self.paths, self.column = list(paths), column
        self._group = lru_cache(_GROUPS)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        value_range = None if self.value_range == "type" else self.value_range
        return ParquetSplit, (self.paths, self.table, self.column, value_range)

    def encoded(self, index: int) -> Encoded:
        """Return the file of an image as it is stored.

        Raises:
            ImageError: it cannot be read.
        """
        number = int(self.table.file[index])
        name = f"{self.paths[number]}: {self.table.keys[index]}"
        try:
            images = self._group(number, int(self.table.offset[index]))
        except (OSError, ValueError) as error:  # also what pyarrow raises
            raise ImageError(f"{name}: cannot be read ({error}).") from error
        data = images[int(self.table.size[index])].as_py()
        if not data:
            raise ImageError(f"{name}: has no image data.")
        return Encoded(data, name)

    def _read_group(self, number: int, group: int) -> Any:
        """Return the files (rows,) of a group of rows, as an array of pyarrow's."""
        with _opened(self.paths[number]) as file:
            column = file.read_row_group(group, columns=[f"{self.column}.bytes"], use_threads=False)
        return column.column(0).combine_chunks().field("bytes")


@checked
class Parquet(TableSource):
    """Source of parquet files as the Hugging Face hub publishes them.

    Class names are those of `classes`, or of the files' own description.

    Args:
        root: folder that contains the files.
        train: pattern of the training files, relative to `root`; None if there is only validation data.
        val: pattern of the validation files.
        image: column of the images, with `bytes` and `path`.
        label: column of the class indices.
        classes: list of class names in the order of the labels, or `imagenet-1k`, `imagenet-a` or `imagenet-r`, to name
            classes by WordNet id; the order is compared with the file names, if these contain ids.
        index: folder that caches keys and labels; None reads them at every start.
        value_range: black and white of images with more than 8 bits per channel; None for those of the type.

    Raises:
        ConfigError: pyarrow is not installed, or files, columns or class names are missing.
    """

    wanted = "the files' pattern"

    def __init__(
        self,
        root: str | None,
        train: str | None = "data/train-*.parquet",
        val: str = "data/validation-*.parquet",
        image: str = "image",
        label: str = "label",
        classes: str | Sequence[str] | None = None,
        index: str | Path | None = None,
        value_range: Annotated[Sequence[float], Length(2)] | None = None,
    ) -> None:
        if not root:
            raise ConfigError("data.root: not set. Set it to the folder of the files: data.root=/path/to/it.")
        self.root, self.index = Path(root).expanduser().absolute(), Path(index) if index else None
        self.image, self.label = image, label
        self.value_range = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        patterns: dict[SplitName, str] = {"val": val}
        if train:
            patterns["train"] = train
        files: dict[SplitName, list[Path]] = {}
        for split, pattern in patterns.items():
            files[split] = sorted(self.root.glob(pattern))
            if not files[split]:
                raise ConfigError(
                    f"data.root={self.root}: contains no {pattern}. Set data.source.{split} to the pattern of the"
                    f" {split} files."
                )
        self.files = files
        self.classes = synsets(classes) if isinstance(classes, str) else list(classes or self._own_classes())

    def open(self, split: SplitName) -> ParquetSplit:
        """Return a split, reading its keys and labels.

        Raises:
            ConfigError: there is no such split, a file is damaged, or images have no labels.
        """
        paths = self.files_of(split)
        about = {"columns": [self.image, self.label], "classes": self.classes, "split": split}
        table = cached(self.index, paths, about, lambda: self._table(split, paths))
        return ParquetSplit(paths, table, self.image, self.value_range)

    def _own_classes(self) -> list[str]:
        """Return the class names in the description that the files contain."""
        path = self.files[self.splits[0]][0]
        with _opened(path) as file:
            described = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(described)["info"]["features"][self.label]["names"]
            return [names[str(i)] for i in range(len(names))] if isinstance(names, dict) else list(names)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path}: does not name its classes. Set data.source.classes to the list of class names, or to"
                " imagenet-1k."
            ) from None

    def _table(self, split: SplitName, paths: list[Path]) -> Table:
        builder, verified = TableBuilder(), 0
        is_imagenet = self.classes == synsets("imagenet-1k")
        for number, path in enumerate(paths):
            for group, row, label, name in self._rows(path):
                if not 0 <= label < len(self.classes):
                    raise ConfigError(
                        f"{path}: image {name or row} has the label {label}, but there are {len(self.classes)} classes"
                        " (published test splits have no labels, only -1). Set data.source.classes, or use another"
                        " split."
                    )
                key = f"{split}/{len(builder):08d}" if not name else name.rpartition(".")[0] or name
                if is_imagenet and name:
                    verified += check_wnid(str(path), name, self.classes[label])
                    key = imagenet_key(name, self.classes[label]) or key
                builder.add(number, group, row, label, key)
        if not len(builder):
            raise ConfigError(f"{paths[0]}: contains no images; download the files again.")
        if is_imagenet and not verified:
            log.warning("%s: no file name contains a WordNet id, so the order of the classes is not verified", paths[0])
        return builder.table()

    def _rows(self, path: Path) -> Any:
        """Yield group of rows, row in it, label and file name of each image."""
        with _opened(path) as file:
            names = file.schema_arrow.names
            for key, column in (("image", self.image), ("label", self.label)):
                if column not in names:
                    raise ConfigError(
                        f"{path}: has no column {column}, only {', '.join(names)}; set data.source.{key} to the right"
                        " one."
                    )
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=[f"{self.image}.path", self.label], use_threads=False)
                paths = rows.column(self.image).combine_chunks().field("path").to_pylist()
                for row, (name, label) in enumerate(zip(paths, rows.column(self.label).to_pylist(), strict=True)):
                    yield group, row, -1 if label is None else int(label), name


def _opened(path: Path) -> Any:
    """Open a parquet file.

    Raises:
        ConfigError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError("data.source: parquet files need pyarrow; install it with: pip install pyarrow.") from error
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise ConfigError(
            f"{path}: is not a parquet file, or damaged ({str(error).splitlines()[0]}); download it again."
        ) from error
