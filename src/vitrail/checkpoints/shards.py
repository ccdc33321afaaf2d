"""Sharded checkpoints: tensors are split by rows over several files, one per process of the training.

The checkpoint itself stays one small file of plain containers. In it, a sharded tensor is on PyTorch's device `meta`,
with a shape and without values. The values are in `<checkpoint>.shards-<id>/<process>.safetensors`, under the path of
keys to the tensor. The checkpoint file names this folder and is written last, so it is always either the complete old
checkpoint or the complete new one. Any number of processes can read it.

PyTorch's own distributed checkpoints are not used because they pickle their index, and loading a checkpoint must not
execute code.

Shapes: tensors are (R, ...) with R rows; a process holds (r, ...) of them.
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
"""Key of a checkpoint under which the folder of its shards is stored."""

Rows = Callable[[int], tuple[int, int]]
"""Maps the number of rows of a tensor to (first row, last row + 1)."""


def local(tensor: Tensor) -> Tensor:
    """Return the rows (r, ...) of `tensor` on this process, or all (R, ...) if it is not sharded; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return all rows (R, ...) of `tensor`; collective, so every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(rank: int, world_size: int) -> Rows:
    """Return the rows that process `rank` holds, as `fully_shard` splits them."""

    def rows(count: int) -> tuple[int, int]:
        each = -(-count // world_size)
        return min(rank * each, count), min((rank + 1) * each, count)

    return rows


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard `tensor` (R, ...), which every process holds completely, like `other` (R, ...)."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    mesh = other.device_mesh
    first, end = rows_of(mesh.get_local_rank(), mesh.size())(len(tensor))
    return as_sharded(tensor[first:end].to(other.device), other.shape, mesh)


def as_sharded(part: Tensor, shape: torch.Size, mesh: Any) -> DTensor:
    """Return the sharded tensor of `shape` (R, ...) of which this process holds the rows `part` (r, ...)."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def split_shards(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return `tree` with sharded tensors replaced by `meta` tensors, and this process's rows of them by path."""
    parts: dict[str, Tensor] = {}
    written: set[int] = set()

    def take(path: str, leaf: Tensor) -> Tensor:
        if not isinstance(leaf, DTensor):
            return leaf
        part = local(leaf).detach().cpu().contiguous()
        # safetensors refuses two names for the same memory: weights without EMA weights are in a checkpoint twice
        parts[path] = part.clone() if part.numel() and part.data_ptr() in written else part
        written.add(part.data_ptr())
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return _mapped(tree, take), parts


def write_shard(folder: Path, rank: int, parts: dict[str, Tensor]) -> None:
    """Write the rows of one process to a file, and flush it to disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{rank:05d}.safetensors").open("wb") as file:
        file.write(save(parts))
        file.flush()
        os.fsync(file.fileno())


def join_shards(
    checkpoint: dict[str, Any], path: Path, rows: Rows | None = None, mesh: Any = None, key: str = "ckpt"
) -> dict[str, Any]:
    """Fill in the values of sharded tensors; return a checkpoint without shards unchanged.

    Args:
        checkpoint: contents of the checkpoint file, with `meta` tensors from `split_shards`.
        path: path of the checkpoint file.
        rows: rows to read of each tensor; None reads all.
        mesh: device mesh; if set, the rows become tensors that are sharded over it.
        key: config key of the file, for messages.

    Raises:
        ConfigError: shards are missing or do not belong to this checkpoint.
    """
    if FOLDER_KEY not in checkpoint:
        return checkpoint
    folder = path.with_name(
        Path(checkpoint[FOLDER_KEY]["folder"]).name
    )  # always next to the checkpoint file, so that a moved checkpoint still loads
    count = int(checkpoint[FOLDER_KEY]["count"])
    files = [folder / f"{rank:05d}.safetensors" for rank in range(count)]
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(
            f"{key}={path}: its shard {missing[0]} is missing; copy the whole folder along with the checkpoint."
        )
    try:
        readers = [safe_open(file, "pt") for file in files]  # mapped, not read

        def fill(name: str, leaf: Tensor) -> Tensor:
            if not leaf.is_meta:
                return leaf
            part = _read(readers, name, leaf, rows)
            return part if mesh is None else as_sharded(part.to(mesh.device_type), leaf.shape, mesh)

        return _mapped(checkpoint, fill)
    except Exception as error:  # SafetensorError derives from Exception directly
        raise ConfigError(f"{key}={path}: its shards in {folder} do not fit it ({error}).") from error


def _read(readers: list[Any], name: str, leaf: Tensor, rows: Rows | None) -> Tensor:
    """Read the requested rows of one tensor from all files, which hold its rows in order."""
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
        raise ConfigError(f"{name} has {start} rows in the shards and {len(leaf)} in the checkpoint")
    return torch.cat(found) if found else torch.empty((0, *leaf.shape[1:]), dtype=leaf.dtype)


def _mapped(tree: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """Return `tree` (dicts and lists) with each tensor replaced by `change(path, tensor)`."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change, f"{path}/{number}") for number, value in enumerate(tree))
    return change(path, tree) if isinstance(tree, Tensor) else tree
