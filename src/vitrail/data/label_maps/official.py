"""Published format of label maps: one `.pt` file per image, a float16 tensor (2, K, H, W) of scores and classes.

A `.pt` file is a zip archive that contains a pickle, which describes the tensor, and the tensor's bytes. Unpickling
takes most of the time, and all files of a data set have the same pickle. So each new pickle is read once with
`torch.load(weights_only=True)`, which executes no code; for further files with that pickle the bytes are read directly.

Shapes: B maps, K scores per cell, H x W cells.
"""

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.data.label_maps.store import LabelMapStore
from vitrail.errors import ConfigError

_END, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_BATCH = 512  # records written at once


class PtReader:
    """Reader of `.pt` files, which returns float16 arrays (2, K, H, W)."""

    def __init__(self) -> None:
        self.known: dict[bytes, tuple[int, ...]] = {}  # pickle -> shape of the tensor it describes

    def __call__(self, data: bytes) -> NDArray[np.float16]:
        """Return the tensor (2, K, H, W) in the bytes of one file.

        Raises:
            ValueError: the file contains no float16 tensor (2, K, H, W), or cannot be read safely.
        """
        members = _members(data)
        if members is None:  # written by torch before 1.6
            return self._load(data)
        pickle, storage = (
            next((v for k, v in members.items() if k.endswith(end)), None) for end in ("/data.pkl", "/data/0")
        )
        if pickle is None or storage is None:
            raise ValueError("contains no tensor.")
        shape = self.known.get(pickle)
        if shape is None or len(storage) != 2 * int(np.prod(shape)):
            array = self._load(data)
            if array.tobytes() == storage:  # contiguous and whole: the bytes are the tensor
                self.known[pickle] = array.shape
            return array
        return np.frombuffer(storage, "<f2").reshape(shape)

    def _load(self, data: bytes) -> NDArray[np.float16]:
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"cannot be read safely ({str(error).splitlines()[0] if str(error) else error!r})."
            ) from error
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype != torch.float16
            or tensor.ndim != 4
            or len(tensor) != 2
        ):
            what = (
                f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise ValueError(f"contains {what}, not a float16 tensor [2, K, H, W].")
        return tensor.contiguous().numpy()


def _members(data: bytes) -> dict[str, bytes] | None:
    """Return names and bytes of the members of an uncompressed zip archive; None if `data` is not such an archive.

    This takes a third of the time of Python's `zipfile`, which matters for a million archives of a few kilobytes.
    """
    end = data.rfind(_END, max(0, len(data) - 65_557))
    if data[:4] != _LOCAL or end < 0:
        return None
    try:
        count, _, position = struct.unpack_from("<HII", data, end + 10)
        members = {}
        for _ in range(count):
            if data[position : position + 4] != _ENTRY:
                return None
            method, stored, size = struct.unpack_from("<H8xII", data, position + 10)
            name_size, extra, comment = struct.unpack_from("<HHH", data, position + 28)
            (local,) = struct.unpack_from("<I", data, position + 42)
            name = data[position + 46 : position + 46 + name_size].decode()
            local_name, local_extra = struct.unpack_from("<HH", data, local + 26)
            begin = local + 30 + local_name + local_extra
            if method != 0 or stored != size or begin + size > len(data):
                return None
            members[name] = data[begin : begin + size]
            position += 46 + name_size + extra + comment
    except (struct.error, UnicodeDecodeError):
        return None
    return members


def import_official(source: str | Path, path: str | Path, num_classes: int = 1000, **about: Any) -> LabelMapStore:
    """Convert a folder or zip of published label maps to a store; a zip is not unpacked.

    A map's key is its path without `.pt` and without leading folders common to all: `n01440764/n01440764_10026`.

    Args:
        source: the folder or zip.
        path: folder of the new store; an unfinished import to it is resumed.
        num_classes: number of the annotator's classes; the published maps have ImageNet-1k's.
        about: further entries of the manifest.

    Raises:
        ConfigError: there are no maps, a file is damaged or of another format, or the maps differ in shape.
    """
    source = Path(source)
    names = _list(source)
    if not names:
        raise ConfigError(f"{source}: contains no .pt files{'' if source.is_dir() else ', or is truncated'}.")
    keys = _keys(names)
    reader, contents = PtReader(), _contents(source, names)
    writer, batch, start = None, [], 0
    for number, (name, data) in enumerate(contents):
        try:
            array = reader(data)
        except ValueError as error:
            raise ConfigError(f"{source}: {name} {error}") from error
        if writer is None:
            about = {"source": "official", "coverage": "center square", **about}
            writer = LabelMapStore.create(path, len(names), array.shape[1], array.shape[2:], num_classes, keys, **about)
        if array.shape[1:] != writer.layout.shape:
            raise ConfigError(f"{source}: {name} has shape {array.shape[1:]}, the others {writer.layout.shape}.")
        batch.append(array)
        if len(batch) == _BATCH or number == len(names) - 1:
            _write(writer, start, batch, source, names)
            start, batch = number + 1, []
    assert writer is not None
    return writer.finish()


def _write(writer: Any, start: int, batch: list[NDArray[np.float16]], source: Path, names: list[str]) -> None:
    whole = np.stack(batch)  # (B, 2, K, H, W)
    classes = whole[:, 1]
    rounded = classes.astype(np.int64)
    wrong = (rounded != classes) | (rounded < 0) | (rounded >= writer.layout.num_classes)
    if wrong.any():
        number = int(np.argmax(wrong.reshape(len(batch), -1).any(1)))
        value = classes[number][wrong[number]].flat[0]
        raise ConfigError(
            f"{source}: {names[start + number]} contains class {value:g},"
            f" which is not in 0 to {writer.layout.num_classes - 1}."
        )
    try:
        writer.write(start, whole[:, 0], rounded)
    except ValueError as error:
        raise ConfigError(f"{source}: {names[start]} or one of the {len(batch) - 1} files after it: {error}") from error


def _list(source: Path) -> list[str]:
    """Return the paths of the `.pt` files relative to the source, sorted."""
    if source.is_dir():
        found = []
        for parent, _, names in os.walk(source):
            inside = Path(parent).relative_to(source).as_posix()
            found += [name if inside == "." else f"{inside}/{name}" for name in names if name.endswith(".pt")]
        return sorted(found)
    if not source.is_file():
        raise ConfigError(f"{source}: no such folder or zip. Check the path.")
    try:
        with zipfile.ZipFile(source) as archive:
            return sorted(name for name in archive.namelist() if name.endswith(".pt"))
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{source}: neither a folder nor a complete zip ({error}).") from error


def _contents(source: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for name in names:
            yield name, (source / name).read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for name in names:
            try:
                yield name, archive.read(name)
            except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
                raise ConfigError(f"{source}: member {name} is damaged ({error}).") from error


def _keys(names: list[str]) -> list[str]:
    """Return the keys of the maps: paths without `.pt` and without common leading folders, down to class/image."""
    paths = [PurePosixPath(name) for name in names]
    if any(part == ".." for path in paths for part in path.parts):
        raise ConfigError("label maps: the archive contains a path with '..'; do not trust it.")
    parts = [path.with_suffix("").parts for path in paths]
    while min(map(len, parts)) > 2 and len({path[0] for path in parts}) == 1:
        parts = [path[1:] for path in parts]
    return ["/".join(path) for path in parts]


def export_official(store: LabelMapStore, folder: str | Path) -> None:
    """Write a store in the published format: `<folder>/<key>.pt`, float16 (2, K, H, W).

    Raises:
        ConfigError: there are more classes than float16 can represent exactly, or a key points outside the folder.
    """
    if store.num_classes > 2049:
        raise ConfigError(
            f"{store.path}: the store has {store.num_classes} classes; the published format supports up to 2049."
        )
    for index in range(len(store)):
        key = store.key(index)
        if ".." in PurePosixPath(key).parts or key.startswith("/"):
            raise ConfigError(f"{store.path}: the key {key} points outside the folder.")
        target = Path(folder) / f"{key}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        scores, classes = store[index]
        torch.save(torch.from_numpy(np.stack((scores, classes.astype(np.float16)))), target)
