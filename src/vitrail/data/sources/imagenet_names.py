"""File names of ImageNet's images: the key that they give, and the class that they name.

Training images are called `n01440764_10026`, validation images `ILSVRC2012_val_00000293`; some releases append the
class to both (`ILSVRC2012_val_00000293_n01440764`). The key is always that of class folders, so that label maps and
ReaL labels fit every release.
"""

import re

from vitrail.errors import ConfigError

_TRAIN = re.compile(r"(n\d{8})_\d+")
_VAL = re.compile(r"ILSVRC2012_val_(\d{8})")
_SUFFIX = re.compile(r"_(n\d{8})$")


def stem_of(name: str) -> str:
    """Return the file name in a path, without its extension."""
    return name.rpartition("/")[2].partition(".")[0]


def imagenet_key(name: str, wnid: str) -> str | None:
    """Return the key of an image of ImageNet, as class folders give it; None if the name is not one of ImageNet's.

    Args:
        name: path or name of the file.
        wnid: WordNet id of the image's class.
    """
    stem = _SUFFIX.sub("", stem_of(name))
    return f"{wnid}/{stem}" if _TRAIN.fullmatch(stem) or _VAL.fullmatch(stem) else None


def named_wnid(name: str) -> str | None:
    """Return the WordNet id that a file name or its folder states; None if there is none."""
    stem, folder = stem_of(name), name.rpartition("/")[0].rpartition("/")[2]
    if match := _SUFFIX.search(stem) or _TRAIN.fullmatch(stem):
        return match[1]
    return folder if re.fullmatch(r"n\d{8}", folder) else None


def val_number(name: str) -> int | None:
    """Return the number of a validation image, from 1 on; None if the name is not that of one."""
    match = _VAL.match(stem_of(name))
    return int(match[1]) if match else None


def check_wnid(file: str, name: str, wnid: str) -> bool:
    """Compare the class that a file name states with the class of its label; return whether the name states one.

    Raises:
        ConfigError: they differ, so the labels have another order of classes.
    """
    stated = named_wnid(name)
    if stated is not None and stated != wnid:
        raise ConfigError(
            f"{file}: {name} is an image of {stated}, but its label is that of {wnid}: the labels use another class"
            " order. Set data.source.classes to the list of classes in the order of the labels."
        )
    return stated is not None
