"""List the files in uncompressed tar archives, with their places, so that each can be read on its own."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from vitrail.errors import ConfigError

_BLOCK = 512  # tar's unit, in bytes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """One file in an archive: its path there, and where its bytes are."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """Yield the files in an archive, in its order.

    Raises:
        ConfigError: the archive is missing, compressed, cut short or damaged; the message names the last file that is
            whole.
    """
    with _opened(path) as file:
        yield from _members(path, file, 0)


def nested_members(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Yield the name of each archive in an archive, and the files in it, with their places in the outer one.

    Raises:
        ConfigError: as `members`.
    """
    with _opened(path) as outer, path.open("rb") as file:
        for name, offset, size in _members(path, outer, 0):
            if name.endswith(".tar"):
                yield name, list(_members(path, _Section(file, offset, size), offset, name))


def _members(path: Path, file: Any, start: int, inside: str = "") -> Iterator[Member]:
    """Yield the files of the archive that `file` reads, which starts at byte `start` of `path`."""
    last, shown = "its start", f"{path}: {inside}" if inside else str(path)
    try:
        archive: Any  # mypy's description of TarFile lacks `members`
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps all entries otherwise
                if entry.isfile():
                    yield Member(entry.name, start + entry.offset_data, entry.size)
                last = entry.name
            # tarfile takes a damaged header for the end of the archive, which is an empty block or the end of the file.
            file.seek(archive.offset)
            if file.read(_BLOCK).strip(b"\0"):
                raise tarfile.ReadError("bad header")
    except tarfile.ReadError as error:
        raise ConfigError(
            f"{shown}: is cut short or damaged after {last} ({error}); download or copy the archive again."
        ) from error


class _Section:
    """Readable part of a file."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def read(self, count: int) -> bytes:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(0, min(count, self.size - self.position)))
        self.position += len(data)
        return data


def _opened(path: Path) -> IO[bytes]:
    """Open an archive.

    Raises:
        ConfigError: it is missing, cannot be read or is compressed.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check data.root.") from error
    start = file.read(6)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            file.close()
            raise ConfigError(
                f"{path}: is compressed with {name}, so its images cannot be read one by one. Decompress it first."
            )
    return file
