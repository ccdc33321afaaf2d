"""Files of a pack: errors of the file system in one sentence, checksums and sizes."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vitrail.errors import ConfigError


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Report errors of the file system within the block as a sentence about `out`.

    Raises:
        ConfigError: a file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"out={out}: cannot be written to ({error.strerror or error}). Choose a folder on a disk with space and"
            " with permission to write; the same command resumes."
        ) from error


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def gib(size: float) -> str:
    """Return a size in bytes in GiB, or in MiB if it is small."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"
