"""Read the weights of a backbone from a checkpoint, whoever wrote it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError

# Where the frameworks keep (average, raw) weights in their files.
_AVERAGE_KEYS = ("state_dict_ema", "model_ema")
_RAW_KEYS = ("state_dict", "model")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint file to the CPU; it is data, so nothing in it is executed (`weights_only=True`).

    Raises:
        ConfigError: the file is missing, broken, or holds more than plain containers and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"ckpt={path}: no such file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"ckpt={path}: not a checkpoint that can be loaded safely ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"ckpt={path}: holds a {type(checkpoint).__name__}, not a checkpoint.")
    return checkpoint


def backbone_weights(checkpoint: dict[str, Any], ema: bool | None = None) -> dict[str, Tensor]:
    """The backbone's state dict out of a checkpoint of vitrail, timm, the official releases, or a bare state dict.

    Args:
        checkpoint: what `read_checkpoint` gave.
        ema: True takes the averaged weights, False the raw ones, None the averaged ones where there are any.

    Raises:
        ConfigError: averaged weights are asked for and there are none.
    """
    if "pytorch-lightning_version" in checkpoint:
        averaged = "current_model_state" in checkpoint  # Lightning's averaging stores the average as `state_dict`
        if ema and not averaged:
            raise ConfigError("weights=ema: the checkpoint holds no averaged weights.")
        weights = checkpoint["current_model_state" if averaged and ema is False else "state_dict"]
        return {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    averages = [checkpoint[key] for key in _AVERAGE_KEYS if checkpoint.get(key) is not None]
    raw = [checkpoint[key] for key in _RAW_KEYS if isinstance(checkpoint.get(key), dict)]
    if ema and not averages:
        raise ConfigError("weights=ema: the checkpoint holds no averaged weights.")
    weights = (averages or raw or [checkpoint])[0] if ema is not False else (raw or [checkpoint])[0]
    return {key.removeprefix("module."): value for key, value in weights.items()}


def load_checkpoint(model: nn.Module, path: str | Path, ema: bool | None = None) -> None:
    """Load the weights at `path` into the backbone `model`; see `backbone_weights` for `ema`.

    Raises:
        ConfigError: keys are missing or unexpected, or a tensor has another shape (another architecture).
    """
    load_weights(model, backbone_weights(read_checkpoint(path), ema), source=str(path))


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `model`, all or nothing.

    Raises:
        ConfigError: as `load_checkpoint`; `source` is named in the message.
    """
    own = model.state_dict()
    shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    problems = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing keys", own.keys() - weights.keys()),
            ("unexpected keys", weights.keys() - own.keys()),
            ("tensors of another shape", shapes),
        )
        if keys
    ]
    if problems:
        raise ConfigError(f"ckpt={source} does not fit {type(model).__name__}: {', '.join(problems)}.")
    model.load_state_dict(weights)
