"""Which files are images: the rule that class folders, pairs of images and masks, and predictions share.

Image files are regular files with an extension that Pillow reads, at any depth. Hidden files and folders, and the
folders of thumbnails and deleted files that systems create, are skipped. Each folder is visited once, so links in a
circle do no harm.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitrail.data.images import image_extensions
from vitrail.errors import ConfigError
from vitrail_runtime.names import readable

# Folders of file servers and operating systems: thumbnails, deleted files, forks of other files.
_SYSTEM_FOLDERS = {
    "#recycle",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "__macosx",
    "__pycache__",
    "_thumbnails",
    "_thumbs",
    "lost+found",
    "system volume information",
    "thumbnails",
}


class FolderWalk:
    """Image files below folders of `root`.

    Args:
        root: folder that contains the folders.
        folders: their names; `.` is the root itself.

    Attributes:
        files: image files of each folder, relative to it, in no particular order.
        ignored: number of other files and folders, by extension or other reason.
        signatures: `signature` of each visited folder, by path below the root with a slash at the end.

    Raises:
        ConfigError: a folder cannot be read.
    """

    def __init__(self, root: Path, folders: Sequence[str] = (".",)) -> None:
        self.root = root
        self.files: dict[str, list[str]] = {name: [] for name in folders}
        self.ignored: Counter[str] = Counter()
        self.signatures: dict[str, list[int]] = {}
        self._links: list[tuple[str, str]] = []
        above = {parent for name in folders for parent in (root / name).resolve().parents}
        self._visited = {_identity(os.stat(folder)) for folder in above}  # noqa: PTH116
        try:
            for name in folders:
                self._walk(name, "")
            while self._links:  # last, so that a folder that is there itself is listed under its own name
                name, prefix = min(self._links)
                self._links.remove((name, prefix))
                self._walk(name, prefix)
        except PermissionError as error:
            raise ConfigError(f"{readable(error.filename)}: no permission to read this folder.") from error

    def _walk(self, name: str, prefix: str) -> None:
        """List the folder `name`, or the folder `prefix` in it (with a slash at the end); collect links."""
        waiting = [prefix]
        while waiting:
            prefix = waiting.pop()
            folder = self.root / name / prefix
            status = os.stat(folder)  # noqa: PTH116
            if prefix and _identity(status) in self._visited:
                self.ignored["link to a folder that is listed elsewhere"] += 1
                continue
            self._visited.add(_identity(status))
            self.signatures[f"{name}/{prefix}"] = signature(status)
            with os.scandir(folder) as entries:  # several times faster than pathlib on ImageNet
                for entry in entries:
                    if reason := reason_to_ignore(entry):
                        self.ignored[reason] += 1
                    elif not entry.is_dir():
                        self.files[name].append(prefix + entry.name)
                    elif entry.is_symlink():
                        self._links.append((name, f"{prefix}{entry.name}/"))
                    else:
                        waiting.append(f"{prefix}{entry.name}/")


def is_image(name: str) -> bool:
    """Return whether a file name is that of a visible image file."""
    return name.lower().endswith(image_extensions()) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden by its name."""
    return name.startswith(".")


def is_system_folder(name: str) -> bool:
    """Return whether a folder is one that file servers and operating systems create."""
    return name.lower() in _SYSTEM_FOLDERS


def normal_form(name: str) -> str:
    """Return the Unicode normal form (NFC) of a name, in which names that look the same are equal."""
    return unicodedata.normalize("NFC", readable(name))


def reason_to_ignore(entry: os.DirEntry[str]) -> str | None:
    """Return the reason to ignore a file or folder, as in `FolderWalk.ignored`; None if it is used."""
    if is_hidden(entry.name):
        return "hidden"
    if entry.is_dir():
        return f"{entry.name}/" if is_system_folder(entry.name) else None
    if not entry.is_file():
        return "broken link" if entry.is_symlink() else "special file"
    return None if is_image(entry.name) else _extension(entry.name)


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Return the counts of ignored files and folders in words, the largest first."""
    kinds = sorted(ignored.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:8])
    return f"{shown}, and {len(kinds) - 8} other kinds" if len(kinds) > 8 else shown


def signature(status: os.stat_result) -> list[int]:
    """Return numbers that change whenever the files in a folder change, even if its modification time is reset."""
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size]


def _extension(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return f".{readable(extension).lower()}" if dot and stem and len(extension) < 12 else "without extension"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
