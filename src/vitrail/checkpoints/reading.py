"""Read checkpoint files of any format, and find in them the backbone's weights and what they were trained for."""

import argparse
import json
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitrail.checkpoints.shards import join_shards
from vitrail.errors import ArgumentError, ConfigError
from vitrail.types import height_width

EXPORTED_NAMES = ("model.safetensors", "pytorch_model.bin")
"""timm's names of weights files for the hub."""

# Names of containers of EMA weights; the teacher of DINO and others is an average, too.
_EMA = ("state_dict_ema", "model_ema", "ema", "ema_model", "ema_state_dict", "teacher")
_RAW = ("state_dict", "model", "student", "model_state_dict")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of PyTorch, at any position of a name
# First bytes of files that are often saved in place of weights.
_NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "a web page or XML; download the file itself"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"\xfd7zXZ", "an xz archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it"),
    (b"\x89HDF", "an HDF5 file, which is not a format of PyTorch"),
)


@dataclass(frozen=True)
class Origin:
    """What a weights file, or the `config.json` beside it, records of the training.

    Attributes:
        classes: class names in the order of the logits; None if unknown.
        size: (height, width) of the network's input in pixels; None if unknown.
    """

    classes: list[str] | None = None
    size: tuple[int, int] | None = None


def read_checkpoint(path: str | Path, values: bool = True, key: str = "ckpt") -> dict[str, Any]:
    """Load a checkpoint file to the CPU, without executing any code in it (`weights_only=True`).

    Args:
        path: the file.
        values: False leaves sharded tensors without values, on the device `meta`.
        key: config key of the file, for error messages.

    Raises:
        ConfigError: the file is missing or damaged, or contains more than plain containers and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{key}={path}: no such file. Check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The official scripts also save their arguments as a Namespace, which is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if what := _what_it_is(path):
            raise ConfigError(f"{key}={path}: is {what}.") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{key}={path}: not a checkpoint that can be loaded safely ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"{key}={path}: contains a {type(checkpoint).__name__}, not a checkpoint.")
    return join_shards(checkpoint, path, key=key) if values else checkpoint


def _what_it_is(path: Path) -> str | None:
    """Return the kind of a file without weights, and what to do; None if it may be a damaged checkpoint."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "empty; copy it again"
    for magic, what in _NOT_WEIGHTS:
        if start.lstrip().startswith(magic):
            return what
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "a zip archive without weights of PyTorch; unpack it"
    return None


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the content of a `config.json` written by timm or `export.py`; None for any other file."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return described if isinstance(described, dict) and "architecture" in described else None


def origin_of(checkpoint: Mapping[str, Any], path: Path | None) -> Origin:
    """Return what a checkpoint of vitrail, timm or an official script, or the `config.json` beside it, records."""
    if isinstance(checkpoint.get("config"), dict) and isinstance(checkpoint.get("classes"), list):
        data = checkpoint.get("input") or checkpoint["config"].get("data") or {}
        return Origin(checkpoint["classes"], _size(data.get("size") or data.get("image_size")))
    is_export = path is not None and (path.name in EXPORTED_NAMES or path.suffix == ".pth")
    described = read_config(path.with_name("config.json")) if path is not None and is_export else None
    if described is not None:
        sizes = described.get("model_args", {}).get("img_size"), described.get("pretrained_cfg", {}).get("input_size")
        size = sizes[0] or (sizes[1][1:] if sizes[1] else None)
        return Origin(described.get("label_names") or None, _size(size))
    arguments = vars(checkpoint["args"]) if isinstance(checkpoint.get("args"), argparse.Namespace) else {}
    size = arguments.get("img_size") or arguments.get("input_size")  # timm's train.py, and those of DeiT and T2T-ViT
    return Origin(None, _size(size[-2:] if isinstance(size, (list, tuple)) else size))


def _size(size: Any) -> tuple[int, int] | None:
    """Return an image size of any origin as (height, width); None if it is not valid."""
    try:
        return height_width(size)
    except ArgumentError:
        return None


def backbone_weights(
    checkpoint: Mapping[str, Any], ema: bool | None = None, names: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the backbone's state dict from a checkpoint of vitrail, timm, an official release, or any other.

    See `find_weights`, whose notes are left out.
    """
    return find_weights(checkpoint, ema, names)[0]


def find_weights(
    checkpoint: Mapping[str, Any], ema: bool | None = None, names: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Find the backbone's state dict in a checkpoint.

    With the backbone's `names`, containers and prefixes (`state_dict.student.backbone.`) are recognised by what follows
    them; PyTorch's wrappers (`_orig_mod.`) may be at any position.

    Args:
        checkpoint: result of `read_checkpoint`.
        ema: True selects the EMA weights, False the raw weights, None the EMA weights if there are any.
        names: names of the backbone's state dict; if empty, only the usual containers are recognised.

    Returns:
        The state dict, and notes: the names of wrappers that were removed, and any unusual container.

    Raises:
        ConfigError: `ema` is True and the checkpoint has no EMA weights.
    """
    tensors = dict(_flattened(checkpoint))
    has_module = any("module" in name.split(".") for name in names)
    wrappers = _WRAPPERS if has_module else _WRAPPERS | {"module"}
    removed = sorted({part for key in tensors for part in key.split(".") if part in wrappers})
    tensors = {".".join(part for part in key.split(".") if part not in wrappers): tensors[key] for key in tensors}
    tensors.pop("n_averaged", None)  # a counter of PyTorch's AveragedModel
    matches = _matches(tensors, set(names)) or _containers(tensors)
    # Lightning's averaging stores the EMA weights as `state_dict`, and the raw ones apart.
    averaged = "current_model_state" in checkpoint

    def is_ema(prefix: str) -> bool:
        parts = prefix.split(".")
        return parts[0] == "state_dict" if averaged else any(part in _EMA for part in parts)

    most = max(matches.values(), default=0)
    complete = {prefix: count for prefix, count in matches.items() if count >= 0.8 * most}
    wanted = [prefix for prefix in complete if is_ema(prefix) == (ema is not False)]
    if ema and not wanted:
        raise ConfigError("weights=ema: the checkpoint contains no EMA weights; use weights=raw.")
    prefix = max(wanted or complete, key=lambda item: (complete[item], -len(item)), default="")
    start = f"{prefix}." if prefix else ""
    found = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    notes = [f"wrapper names removed: {', '.join(removed)}."] if removed else []
    return found, notes + _describe_place(prefix, tensors, found)


def _flattened(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")


def _matches(tensors: Collection[str], names: set[str]) -> Counter[str]:
    """Count the backbone's names after each prefix."""
    found: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        found.update(".".join(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    return found


def _containers(tensors: Collection[str]) -> Counter[str]:
    """Count the tensors in the usual containers; if there are none, all tensors, after a prefix that all share."""
    first = Counter(key.partition(".")[0] for key in tensors)
    found = Counter({name: first[name] for name in (*_EMA, *_RAW, "current_model_state") if first[name]})
    inner: Counter[str] = Counter()
    for name, count in found.items():
        below = Counter(key.split(".")[1] for key in tensors if key.startswith(f"{name}."))
        shared = [word for word in ("model", "net", "backbone") if word in below]
        inner[f"{name}.{shared[0]}" if shared else name] = below[shared[0]] if shared else count
    return inner or Counter({"": len(tensors)})


def _describe_place(prefix: str, tensors: Collection[str], found: Collection[str]) -> list[str]:
    """Describe where the weights were found, if that is not one of the usual containers."""
    container, _, inner = prefix.partition(".")
    if not prefix or (container in (*_EMA, *_RAW, "current_model_state") and inner in ("", "model")):
        return []
    beside = sorted(
        {key.split(".")[1 if container in (*_EMA, *_RAW) else 0] for key in tensors if not key.startswith(f"{prefix}.")}
    )
    others = f"; ignored: {', '.join(beside[:4])}{', ...' if len(beside) > 4 else ''}" if beside else ""
    return [f"weights found as {prefix}.* ({len(found)} tensors){others}."]


def weight_sets(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the kinds of weights in a checkpoint: `raw`, `ema` or both, in this order."""
    if "current_model_state" in checkpoint:
        return ["raw", "ema"]
    has_ema = any(isinstance(checkpoint.get(name), Mapping) for name in _EMA)
    has_raw = any(isinstance(checkpoint.get(name), Mapping) for name in _RAW)
    return ["raw"] * (has_raw or not has_ema) + ["ema"] * has_ema
