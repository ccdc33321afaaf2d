"""Labels of ImageNet's validation images, from the development kit or from Kaggle's list.

The kit's ground truth has one class id per image, 1 to 1000, in an order of the kit's own. Its `meta.mat` says which
WordNet id each of them is.
"""

import csv
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from vitrail.data.sources.imagenet import difference, synsets
from vitrail.data.sources.imagenet_names import val_number
from vitrail.errors import ConfigError

SOLUTION = "LOC_val_solution.csv"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def label_file(root: Path, devkit: str) -> Path:
    """Return the file with the labels of the validation images.

    Raises:
        ConfigError: there is none.
    """
    unpacked = root / devkit.partition(".")[0] / "data" / _TRUTH
    for path in (root / devkit, unpacked, root / SOLUTION):
        if path.is_file():
            return path
    raise ConfigError(
        f"data.root={root}: contains no labels of the validation images. Put {devkit} there, the development kit of"
        f" ILSVRC 2012, or Kaggle's {SOLUTION}."
    )


def val_labels(path: Path) -> Callable[[str], int]:
    """Read the labels of the validation images, and return a function from a file's path to its class."""
    index_of = {wnid: index for index, wnid in enumerate(synsets("imagenet-1k"))}
    wnids = _solution(path) if path.suffix == ".csv" else _devkit(path)
    if unknown := sorted(set(wnids.values()) - set(index_of)):
        raise ConfigError(f"{path}: contains the class {unknown[0]}, which is not one of ImageNet-1k's.")

    def label_of(name: str) -> int:
        number = val_number(name)
        if number not in wnids:
            raise ConfigError(
                f"{path}: has no label for the validation image {name}. The images need their original names"
                " (ILSVRC2012_val_00000001.JPEG ...)."
            )
        return index_of[wnids[number]]

    return label_of


def _solution(path: Path) -> dict[int, str]:
    """Return the WordNet id of each validation image from Kaggle's list."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        numbers = [val_number(row["ImageId"]) for row in rows]
        return {number: row["PredictionString"].split()[0] for number, row in zip(numbers, rows, strict=True) if number}
    except (KeyError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{path}: must have the columns ImageId and PredictionString, as Kaggle's file; download it again."
        ) from error


def _devkit(path: Path) -> dict[int, str]:
    """Return the WordNet id of each validation image from the development kit.

    Args:
        path: the kit's archive, or the ground truth in the folder that it unpacks to.

    Raises:
        ConfigError: a file is missing or damaged, or the kit's ids are not 1 to 1000.
    """
    try:
        if path.suffix == ".txt":
            truth, meta = path.read_bytes(), (path.parent / "meta.mat").read_bytes()
        else:
            with tarfile.open(path) as archive:
                content = {Path(entry.name).name: entry for entry in archive if entry.isfile()}
                truth, meta = (archive.extractfile(content[name]).read() for name in (_TRUTH, "meta.mat"))  # type: ignore[union-attr]
        wnids = _devkit_classes(meta)
        return {number: wnids[int(line)] for number, line in enumerate(truth.split(), start=1)}
    except (OSError, KeyError, ValueError, IndexError, TypeError, tarfile.TarError) as error:
        raise ConfigError(
            f"{path}: is not the development kit of ILSVRC 2012, or damaged ({type(error).__name__}: {error});"
            " download it again."
        ) from error


def _devkit_classes(meta: bytes) -> dict[int, str]:
    """Return the WordNet id of each class id of the kit, 1 to 1000; its other entries are groups of classes."""
    from scipy.io import loadmat  # part of scikit-learn's requirements; slow to import

    try:
        synset = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
    except Exception as error:  # scipy raises many kinds of exceptions for damaged files
        raise ValueError(f"meta.mat cannot be read: {error}") from error
    entries = zip(synset["ILSVRC2012_ID"], synset["WNID"], synset["num_children"], strict=True)
    wnids = {int(number): str(wnid) for number, wnid, children in entries if int(children) == 0}
    if sorted(wnids) != list(range(1, 1001)) or difference(list(wnids.values()), synsets("imagenet-1k")):
        raise ValueError("meta.mat does not list the 1000 classes of ImageNet-1k")
    return wnids
