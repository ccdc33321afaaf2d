"""Checkpoints whose tensors are cut in rows over several files, one for each process that trained.

The checkpoint itself stays one small file of plain containers. A tensor that is cut is a tensor of PyTorch's device
`meta` in it, which has a shape and no values; these lie in `<checkpoint>.shards-<id>/<process>.safetensors`, under the
path of keys that leads to the tensor. The file names that folder, and is written last: it is the old checkpoint or the
new one, and any number of processes can read either.

PyTorch's own distributed checkpoints pickle their index, and a checkpoint from somebody else must not run code.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vitrail.errors import ConfigError

FOLDER_KEY = "shards"
"""Key of a checkpoint that names the folder of its shards."""

Rows = Callable[[int], tuple[int, int]]
"""First row, and the one after the last, of a tensor with so many."""


def local(tensor: Tensor) -> Tensor:
    """The rows of `tensor` that this process holds: all, unless it is cut; it shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All rows of `tensor`; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(rank: int, world_size: int) -> Rows:
    """Which rows process `rank` holds, as `fully_shard` cuts."""

    def rows(count: int) -> tuple[int, int]:
        each = -(-count // world_size)
        return min(rank * each, count), min((rank + 1) * each, count)

    return rows


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, whole on every process, cut as `other` is."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    mesh = other.device_mesh
    first, end = rows_of(mesh.get_local_rank(), mesh.size())(len(tensor))
    return as_cut(tensor[first:end].to(other.device), other.shape, mesh)


def as_cut(part: Tensor, shape: torch.Size, mesh: Any) -> DTensor:
    """The tensor of `shape` of which this process holds the rows `part`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def take_out(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """`tree` with `meta` tensors in place of those that are cut, and this process's rows of these by their path."""
    parts: dict[str, Tensor] = {}

    def take(path: str, leaf: Tensor) -> Tensor:
        if not isinstance(leaf, DTensor):
            return leaf
        parts[path] = local(leaf).detach().cpu().contiguous()
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return _mapped(tree, take), parts


def write_shard(folder: Path, rank: int, parts: dict[str, Tensor]) -> None:
    """Write one process's rows, to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{rank:05d}.safetensors").open("wb") as file:
        file.write(save(parts))
        file.flush()
        os.fsync(file.fileno())


def put_back(checkpoint: dict[str, Any], path: Path, rows: Rows | None = None, mesh: Any = None) -> dict[str, Any]:
    """Fill in what lies in the shards of the checkpoint that was read from `path`; others are given back as they are.

    Args:
        checkpoint: as `take_out` left it.
        path: its file.
        rows: which rows of each tensor to read; None reads all.
        mesh: of processes; with it the rows become tensors cut over them.

    Raises:
        ConfigError: the shards are not there, not all of them, or not of this checkpoint.
    """
    if FOLDER_KEY not in checkpoint:
        return checkpoint
    folder = path.with_name(Path(checkpoint[FOLDER_KEY]["folder"]).name)  # beside the file, whatever it says
    count = int(checkpoint[FOLDER_KEY]["count"])
    files = [folder / f"{rank:05d}.safetensors" for rank in range(count)]
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"ckpt={path}: its part {missing[0]} is not there.")
    try:
        readers = [safe_open(file, "pt") for file in files]  # mapped, not read

        def fill(name: str, leaf: Tensor) -> Tensor:
            if not leaf.is_meta:
                return leaf
            part = _read(readers, name, leaf, rows)
            return part if mesh is None else as_cut(part.to(mesh.device_type), leaf.shape, mesh)

        return _mapped(checkpoint, fill)
    except Exception as error:  # safetensors has an exception of its own, which is none of Python's kinds
        raise ConfigError(f"ckpt={path}: its parts in {folder} do not fit it ({error}).") from error


def _read(readers: list[Any], name: str, leaf: Tensor, rows: Rows | None) -> Tensor:
    """The asked rows of one tensor out of all files, which hold its rows in their order."""
    first, end = (0, len(leaf)) if rows is None else rows(len(leaf))
    found, start = [], 0
    for reader in readers:
        part = reader.get_slice(name)
        length = part.get_shape()[0]
        low, high = max(first - start, 0), min(end - start, length)
        if low < high:
            found.append(part[low:high])
        start += length
    if start != len(leaf):
        raise ConfigError(f"{name} has {start} rows there and {len(leaf)} here")
    return torch.cat(found) if found else torch.empty((0, *leaf.shape[1:]), dtype=leaf.dtype)


def _mapped(tree: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """`tree` of dicts and lists with `change(path, tensor)` in place of its tensors."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change, f"{path}/{number}") for number, value in enumerate(tree))
    return change(path, tree) if isinstance(tree, Tensor) else tree
