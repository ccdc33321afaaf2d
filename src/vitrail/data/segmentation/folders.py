"""Images and masks in two folders, paired by the stems of their names."""

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrail.data.bit_depth import ValueRange
from vitrail.data.images import read_header, read_image, size_of
from vitrail.data.sampling import sample_of
from vitrail.data.segmentation.values import MaskCheck, ValueTable, distinct, occurring, read_mask
from vitrail.data.sources.contract import SplitName
from vitrail.data.sources.files import FolderWalk, describe_ignored, normal_form
from vitrail.data.sources.value_range import SAMPLE, given_range, sampled_range
from vitrail.errors import ConfigError, ImageError
from vitrail.types import MASK_IGNORE, Picture
from vitrail_runtime.checking import RGB, Length, checked
from vitrail_runtime.names import readable

log = logging.getLogger(__name__)


class MaskedSample(NamedTuple):
    """One image of a source with its mask."""

    image: Picture
    mask: NDArray[np.uint8]
    """(H, W) classes; `MASK_IGNORE` where a pixel is not labelled."""
    key: str


class MaskedSplit:
    """Split of a `SegmentationFolder`: a sequence of `MaskedSample`s, sorted by key.

    Args:
        pairs: image and mask by key.
        table: table from values to classes.
        value_range: see `read_image`.
        ignored: number of other files and folders in the folder of images, by kind.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[Path, Path]],
        table: ValueTable,
        value_range: ValueRange | Literal["type"] = "type",
        ignored: Mapping[str, int] | None = None,
    ) -> None:
        self._keys, self._pairs, self.table = list(pairs), list(pairs.values()), table
        self.value_range, self.ignored = value_range, dict(ignored or {})

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[str]:
        """Return the keys of all samples: paths below the folder of images, without suffix and extension."""
        return self._keys

    def files(self, index: int) -> tuple[Path, Path]:
        """Return the image and the mask of a sample."""
        return self._pairs[index]

    def check(self, index: int) -> MaskCheck:
        """Check a mask with no more than the header of its image.

        Raises:
            ImageError: as `__getitem__`, but for damaged pixels of the image.
        """
        image_path, mask_path = self._pairs[index]
        header = read_header(image_path)
        values = distinct(self._values(index, header.size))  # the classes of all pixels would take longer
        return MaskCheck(header.is_turned, occurring(self._classes(values, mask_path)))

    def __getitem__(self, index: int) -> MaskedSample:
        """Read image and mask.

        Raises:
            ImageError: a file cannot be read, the sizes differ, a value is in no class, or no pixel is labelled.
        """
        image_path, mask_path = self._pairs[index]
        image = read_image(image_path, self.value_range)
        mask = self._classes(self._values(index, size_of(image)), mask_path)
        return MaskedSample(image, mask, self._keys[index])

    def _values(self, index: int, size: tuple[int, int]) -> NDArray[Any]:
        """Return the values of the mask of an image with `size` (height, width); see `read_mask`."""
        image_path, mask_path = self._pairs[index]
        values = read_mask(mask_path)
        if values.shape[:2] != size:
            raise ImageError(
                f"{mask_path}: is {values.shape[0]} x {values.shape[1]} pixels, its image {image_path.name}"
                f" {size[0]} x {size[1]} (upright, by its EXIF orientation); make both the same size."
            )
        return values

    def _classes(self, values: NDArray[Any], mask_path: Path) -> NDArray[np.uint8]:
        """Return the classes of the values of a mask."""
        mask = self.table.classes(values, str(mask_path))
        if (mask == MASK_IGNORE).all():
            raise ImageError(
                f"{mask_path}: no pixel is labelled; remove the image, or set data.on_corrupt=skip to leave out such"
                " images."
            )
        return mask


@checked
class SegmentationFolder:
    """Source of images and masks in two folders each for training and validation.

    An image belongs to the mask with the same path below its folder, without extension and after removing the suffixes.

    Args:
        root: folder that all other paths are relative to.
        train_images: folder of the training images.
        train_masks: folder of the training masks.
        val_images: folder of the validation images.
        val_masks: folder of the validation masks.
        train_list: file with the keys of the training images, one per line; None uses all.
        val_list: as `train_list`, for validation.
        image_suffix: end of the stem of every image; files without it are not used.
        mask_suffix: end of the stem of every mask; files without it are not used.
        classes: names of the classes, or a file of them: one per line, or a table with a column `Name` (ADE20K's
            objectInfo150).
        on_unpaired: `stop` if an image has no mask, or `skip` such images.
        value_range: as in `ImageFolder`.
        shift, map, ignore, colours, ignore_colours: see `ValueTable`.

    Raises:
        ConfigError: a folder or file is missing, or images have no masks; the message names the key.
    """

    def __init__(
        self,
        root: str | None,
        classes: Sequence[str] | str,
        train_images: str = "images/train",
        train_masks: str = "masks/train",
        val_images: str = "images/val",
        val_masks: str = "masks/val",
        train_list: str | None = None,
        val_list: str | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        on_unpaired: Literal["stop", "skip"] = "stop",
        value_range: Annotated[Sequence[float], Length(2)] | None = None,
        shift: int = 0,
        map: Mapping[int, int] | None = None,
        ignore: Sequence[int] = (),
        colours: Sequence[RGB] | None = None,
        ignore_colours: Sequence[RGB] = (),
    ) -> None:
        if root is None:
            raise ConfigError("data.root: not set; set it to the folder of images and masks.")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ConfigError(f"data.root={root}: no such folder. Set it to the folder of images and masks.")
        self.folders = {"train": (train_images, train_masks), "val": (val_images, val_masks)}
        self.lists, self.suffixes = {"train": train_list, "val": val_list}, (image_suffix, mask_suffix)
        self.on_unpaired = on_unpaired
        self.classes = read_classes(self.root / classes) if isinstance(classes, str) else list(classes)
        self.value_range = given_range(value_range)
        self.ignored: dict[str, Counter[str]] = {}
        self._found: dict[str, tuple[dict[str, Path], dict[str, Path]]] = {}
        self.table = ValueTable(len(self.classes), shift, map, ignore, colours, ignore_colours)

    def prepare(self) -> None:
        """Do nothing: the files are there."""

    def open(self, split: SplitName) -> MaskedSplit:
        """Return the training or validation split.

        Raises:
            ConfigError: a folder or file is missing, or images have no masks.
        """
        pairs, alone = self.pairs(split)
        if alone and self.on_unpaired == "stop":
            raise ConfigError(
                f"data.source.{split}_masks: {len(alone)} of {len(alone) + len(pairs)} images have no mask, the first"
                f" is {alone[0]}; add the masks, or set data.source.on_unpaired=skip."
            )
        if alone:
            log.warning("%s: skipped %d images without mask, the first is %s", split, len(alone), alone[0])
        if not pairs:
            images, masks = (self.root / name for name in self.folders[split])
            raise ConfigError(
                f"data.source.{split}_images: no image in {images} has a mask in {masks}; check the folders,"
                " data.source.image_suffix and data.source.mask_suffix."
            )
        if self.value_range is None:
            files = [image for image, _ in (self.pairs("train")[0] if split == "val" else pairs).values()]
            self.value_range = sampled_range([files[int(index)] for index in sample_of(len(files), SAMPLE)])
        if ignored := self.ignored[split]:
            log.info("%s: ignored %s", self.root / self.folders[split][0], describe_ignored(ignored))
        return MaskedSplit(pairs, self.table, self.value_range or "type", ignored)

    def pairs(self, split: SplitName) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
        """Return image and mask of a split by key, sorted, and the keys of images without mask."""
        images, masks = self._files(split)
        keys = sorted(images)
        if (listed := self.lists[split]) is not None:
            keys = _read_lines(self.root / listed, f"data.source.{split}_list")
            if missing := [key for key in keys if key not in images]:
                raise ConfigError(
                    f"data.source.{split}_list={listed}: {len(missing)} of its images are missing, the first is"
                    f" {missing[0]}."
                )
        return {key: (images[key], masks[key]) for key in keys if key in masks}, [k for k in keys if k not in masks]

    def masks_alone(self, split: SplitName) -> list[str]:
        """Return the keys of masks without image."""
        if self.lists[split] is not None:
            return []
        images, masks = self._files(split)
        return sorted(masks.keys() - images.keys())

    def _files(self, split: SplitName) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return the image files and the mask files of a split by key."""
        if split not in self._found:
            images, masks = (
                FilesByKey(self.root / folder, suffix, f"data.source.{split}_{what}")
                for folder, suffix, what in zip(self.folders[split], self.suffixes, ("images", "masks"), strict=True)
            )
            self.ignored[split] = images.ignored
            self._found[split] = images.files, masks.files
        return self._found[split]


class FilesByKey:
    """Image files below a folder whose stem ends with a suffix, by key: path without suffix and extension.

    Keys are valid UTF-8 in Unicode's normal form, so that names which look the same belong together.

    Args:
        folder: the folder.
        suffix: end of the stem.
        key: config key of the folder, for messages.

    Attributes:
        files: path by key.
        ignored: see `FolderWalk`.

    Raises:
        ConfigError: the folder is missing or cannot be read, or two files have the same key.
    """

    def __init__(self, folder: Path, suffix: str, key: str) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{key}: no such folder {folder}. Set it to the folder's path below data.root.")
        walk = FolderWalk(folder)
        self.files: dict[str, Path] = {}
        self.ignored = walk.ignored
        for name in sorted(walk.files["."]):
            stem = name.rpartition(".")[0]
            if not stem.endswith(suffix):
                continue
            short = normal_form(stem.removesuffix(suffix))
            if short in self.files:
                raise ConfigError(
                    f"{key}: {readable(self.files[short].name)} and {readable(str(folder / name))} have the same name;"
                    " remove one of them."
                )
            self.files[short] = folder / name


def _read_lines(path: Path, key: str) -> list[str]:
    """Return the lines of a text file in Unicode's normal form, without empty ones.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{key}={path}: is not UTF-8 text; save it as UTF-8.") from None
    return [normal_form(line.strip()) for line in text.split("\n") if line.strip()]


def read_classes(path: Path) -> list[str]:
    """Return the class names in a file: one per line, or the column `Name` of a table with commas or tabs.

    Of several names of one class, separated by `;` or `,`, the first is used, unless another class has it too.

    Raises:
        ConfigError: the file is missing or empty, or a name occurs twice.
    """
    lines = _read_lines(path, "data.source.classes")
    if lines and "Name" in lines[0].replace("\t", ",").split(","):
        rows: Iterable[dict[str, Any]] = csv.DictReader(lines, delimiter="\t" if "\t" in lines[0] else ",")
        entries = [str(row["Name"]).strip() for row in rows]
        short = [entry.replace(";", ",").split(",")[0].strip() for entry in entries]
        counts = Counter(short)
        names = [one if counts[one] == 1 else entry for one, entry in zip(short, entries, strict=True)]
    else:
        names = lines
    if not names or len(set(names)) != len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        reason = f"the name {twice[0]} occurs twice" if twice else "contains no names"
        raise ConfigError(f"data.source.classes={path}: {reason}.")
    return names
