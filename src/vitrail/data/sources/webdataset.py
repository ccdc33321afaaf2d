"""WebDataset shards: uncompressed tar archives with the files of one sample next to each other.

A sample is `key.jpg` (or another image) with `key.cls`, the class index or name, `key.txt`, the class name, or
`key.json` with `label` or `cls` and, for the name, `class_name` or `label_name`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from vitrail.data.images import image_extensions
from vitrail.data.sources.contract import SplitName
from vitrail.data.sources.imagenet import synsets
from vitrail.data.sources.imagenet_names import check_wnid, imagenet_key
from vitrail.data.sources.ranges import Files, RangeSplit
from vitrail.data.sources.table_sources import TableSource
from vitrail.data.sources.tables import Table, TableBuilder, cached
from vitrail.data.sources.tars import Member, members
from vitrail.errors import ConfigError
from vitrail_runtime.checking import Length, checked

_NAME_FILES = ("classes.txt", "classnames.txt")
_LABELS, _NAMES = ("label", "cls"), ("class_name", "label_name", "classname")


@checked
class WebDataset(TableSource):
    """Source of WebDataset shards, which are read in any order through an index.

    Class names are those of `classes`, of `classes.txt` or `classnames.txt` in `root` (one per line), or those that the
    samples themselves name.

    Args:
        root: folder of the shards.
        train: shards of the training split, relative to `root`: a pattern (`train-*.tar`) or a range
            (`train-{0000..1023}.tar`); None if there is only validation data.
        val: shards of the validation split.
        classes: list of class names in the order of the labels, or `imagenet-1k`, `imagenet-a` or `imagenet-r`.
        index: folder that caches the places of the images; None lists the shards at every start.
        value_range: black and white of images with more than 8 bits per channel; None for those of the type.

    Raises:
        ConfigError: a shard is missing.
    """

    wanted = "the names of the shards"

    def __init__(
        self,
        root: str | None,
        train: str | None = "*train*.tar",
        val: str = "*val*.tar",
        classes: str | Sequence[str] | None = None,
        index: str | Path | None = None,
        value_range: Annotated[Sequence[float], Length(2)] | None = None,
    ) -> None:
        if not root:
            raise ConfigError("data.root: not set. Set it to the folder of the shards: data.root=/path/to/it.")
        self.root, self.index = Path(root).expanduser().absolute(), Path(index) if index else None
        self.value_range = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        patterns: dict[SplitName, str] = {"val": val}
        if train:
            patterns["train"] = train
        self.files = {split: _shards(self.root, split, pattern) for split, pattern in patterns.items()}
        self._given = _class_names(self.root, classes)
        self.is_imagenet = self._given == synsets("imagenet-1k")
        self._names: list[str] | None = None

    @property
    def classes(self) -> list[str]:
        """Class names; found in the samples of the training split if they are not given."""
        if self._given is not None:
            return self._given
        if self._names is None:
            self._names = _names_in(self.files[self.splits[0]])
        return self._names

    def open(self, split: SplitName) -> RangeSplit:
        """Return a split, listing its shards.

        Raises:
            ConfigError: there is no such split, a shard is damaged, or a sample has no label.
        """
        paths = self.files_of(split)
        about = {"classes": list(self.classes), "split": split}
        table = cached(self.index, paths, about, lambda: self._table(paths))
        return RangeSplit(paths, table, self.value_range)

    def _table(self, paths: list[Path]) -> Table:
        names, builder = list(self.classes), TableBuilder()
        index_of = {name: index for index, name in enumerate(names)}
        for number, path in enumerate(paths):
            for sample in _samples(path):
                label = sample.label if sample.label is not None else index_of.get(sample.class_name or "", -1)
                if not 0 <= label < len(names):
                    raise ConfigError(
                        f"{path}: {sample.key} has the class {sample.class_name or label}, which is not one of the"
                        f" {len(names)} classes; set data.source.classes."
                    )
                key = sample.key
                if self.is_imagenet:
                    check_wnid(str(path), sample.key, names[label])
                    key = imagenet_key(sample.key, names[label]) or key
                builder.add(number, sample.image.offset, sample.image.size, label, key)
        if not len(builder):
            raise ConfigError(f"{paths[0]}: contains no images; check data.source.train and data.source.val.")
        return builder.table()


class _Found(NamedTuple):
    key: str
    image: Member
    label: int | None
    class_name: str | None


def _samples(path: Path) -> Iterator[_Found]:
    """Yield the samples of a shard.

    Raises:
        ConfigError: a sample has no label, or the shard is damaged.
    """
    files = Files([path])
    for key, group in groupby(members(path), key=lambda member: _split_name(member.name)[0]):
        parts = {_split_name(member.name)[1]: member for member in group}
        image = next((parts[kind] for kind in parts if f".{kind.rpartition('.')[2]}" in image_extensions()), None)
        if image is None:
            continue
        texts: dict[str, str] = {
            kind: files.read(0, parts[kind].offset, parts[kind].size).decode("utf-8", "replace").strip()
            for kind in ("cls", "txt", "json")
            if kind in parts
        }
        label, name = _label(path, key, texts)
        if label is None and name is None:
            raise ConfigError(f"{path}: {key} has no label; add a file {key}.cls, .txt or .json next to the image.")
        yield _Found(key, image, label, name)


def _split_name(name: str) -> tuple[str, str]:
    """Return key and extension of a file: the name up to the first dot after the last slash, and the rest."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(path: Path, key: str, texts: dict[str, str]) -> tuple[int | None, str | None]:
    """Return class index and class name of a sample, as far as its files state them."""
    label, name = _number(texts.get("cls")), texts.get("txt") or None
    if label is None:
        name = texts.get("cls") or name
    if "json" in texts:
        try:
            values: Any = json.loads(texts["json"])
        except ValueError as error:
            raise ConfigError(f"{path}: {key}.json is not valid ({error}); write the shard again.") from error
        stated = [values[field] for field in _LABELS if field in values] if isinstance(values, dict) else []
        named = [values[field] for field in _NAMES if field in values] if isinstance(values, dict) else []
        if label is None and stated:
            label = _number(stated[0])
            name = name or (None if label is not None else str(stated[0]))
        name = name or (str(named[0]) if named else None)
    return label, name


def _number(value: Any) -> int | None:
    """Return a class index, also from its decimal digits; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else None


def _names_in(paths: list[Path]) -> list[str]:
    """Return the class names that samples state, by their class indices, or sorted if there are none.

    Raises:
        ConfigError: samples have indices without names, or different names for one index.
    """
    names: dict[int, str] = {}
    unnumbered: set[str] = set()
    for path in paths:
        for sample in _samples(path):
            if sample.class_name is None:
                raise ConfigError(
                    f"{path}: {sample.key} has a class index but no class name. Set data.source.classes to the list of"
                    " names or to imagenet-1k, or list the names in classes.txt next to the shards, one per line."
                )
            if sample.label is None:
                unnumbered.add(sample.class_name)
            elif names.setdefault(sample.label, sample.class_name) != sample.class_name:
                raise ConfigError(
                    f"{path}: {sample.key} calls class {sample.label} {sample.class_name}, but other samples call it"
                    f" {names[sample.label]}. Set data.source.classes to the list of class names."
                )
    if names and (unnumbered or sorted(names) != list(range(len(names)))):
        raise ConfigError(
            f"{paths[0]}: not every class index has samples with a name, so the class names cannot be found. Set"
            " data.source.classes to the list of class names."
        )
    return [names[index] for index in range(len(names))] or sorted(unnumbered)


def _class_names(root: Path, classes: str | Sequence[str] | None) -> list[str] | None:
    """Return the class names that the user gives; None if there are none."""
    if isinstance(classes, str):
        return synsets(classes)
    if classes is not None:
        return list(classes)
    for name in _NAME_FILES:
        if (root / name).is_file():
            return [line.strip() for line in (root / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def _shards(root: Path, split: SplitName, pattern: str) -> list[Path]:
    """Return the files that a pattern with ranges in braces names.

    Raises:
        ConfigError: there are none, or a file of a range is missing.
    """
    named = _expanded(pattern)
    paths = [root / name for name in named] if len(named) > 1 else sorted(root.glob(pattern))
    if not paths:
        raise ConfigError(
            f"data.root={root}: contains no {pattern}. Set data.source.{split} to the names of the {split} shards, such"
            f" as {split}-{{0000..0009}}.tar."
        )
    if missing := [path for path in paths if not path.is_file()]:
        raise ConfigError(
            f"data.source.{split}={pattern}: {len(missing)} of {len(paths)} shards are missing, first {missing[0]}."
        )
    return paths


def _expanded(pattern: str) -> list[str]:
    """Return the names of a pattern with ranges ({00..09}) and alternatives ({a,b}) in braces."""
    choices: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            width = len(match[1])
            choices.append([f"{number:0{width}d}" for number in range(int(match[1]), int(match[2]) + 1)])
        else:
            choices.append(part[1:-1].split(",") if part.startswith("{") else [part])
    return ["".join(parts) for parts in product(*choices)]
