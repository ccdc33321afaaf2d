"""Read the weights of a backbone from a checkpoint, whoever wrote it, and fit them to the model at hand."""

import argparse
import fnmatch
import logging
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vitrail.checkpoints.shards import put_back
from vitrail.errors import ConfigError

log = logging.getLogger(__name__)

# Where the frameworks keep (average, raw) weights in their files.
_AVERAGE_KEYS = ("state_dict_ema", "model_ema")
_RAW_KEYS = ("state_dict", "model")
_HEADS = ("head", "head_dist", "aux_head")


def read_checkpoint(path: str | Path, values: bool = True, key: str = "ckpt") -> dict[str, Any]:
    """Load a checkpoint file to the CPU; it is data, so nothing in it is executed (`weights_only=True`).

    Args:
        path: the file.
        values: False leaves tensors that are cut over several files without values, on the device `meta`.
        key: what the config calls the file, for messages.

    Raises:
        ConfigError: the file is missing, broken, or holds more than plain containers and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{key}={path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The official scripts save their arguments, a Namespace, beside the weights; it is a plain container, too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{key}={path}: not a checkpoint that can be loaded safely ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"{key}={path}: holds a {type(checkpoint).__name__}, not a checkpoint.")
    return put_back(checkpoint, path) if values else checkpoint


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


def weight_sets(checkpoint: dict[str, Any]) -> list[str]:
    """Which weights a checkpoint holds: `raw`, `ema` or both, in this order."""
    if "pytorch-lightning_version" in checkpoint:
        return ["raw", "ema"] if "current_model_state" in checkpoint else ["raw"]
    averaged = any(checkpoint.get(key) is not None for key in _AVERAGE_KEYS)
    raw = any(isinstance(checkpoint.get(key), dict) for key in _RAW_KEYS)
    return ["raw"] * (raw or not averaged) + ["ema"] * averaged


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    ema: bool | None = None,
    allow: Sequence[str] = (),
    same_classes: bool = False,
    key: str = "ckpt",
) -> list[str]:
    """Load the weights at `path` into the backbone `model`, fitted to it: see `fit_weights`.

    Args:
        model: any backbone.
        path: a checkpoint of vitrail, Lightning, timm (also .safetensors) or the official releases; an .npz of
            Google's for a ViT.
        ema: see `backbone_weights`.
        allow: patterns of keys (`aux_head.*`) that may be missing or unexpected.
        same_classes: refuse a classifier of another number of classes, rather than keep the model's own, untrained.
        key: what the config calls the file, for messages.

    Returns:
        What was changed on the way, one sentence each; also logged.

    Raises:
        ConfigError: keys are missing or unexpected, or a tensor has another shape (another architecture).
    """
    if Path(path).suffix == ".npz" and hasattr(model, "load_pretrained"):
        if not Path(path).is_file():
            raise ConfigError(f"{key}={path}: no such file.")
        reader: Any = model
        reader.load_pretrained(str(path))  # timm's reader of the JAX releases, which resizes positions its own way
        return []
    weights, notes = fit_weights(
        backbone_weights(read_checkpoint(path, key=key), ema), model, f"{key}={path}", same_classes
    )
    load_weights(model, weights, source=f"{key}={path}", allow=allow)
    missing = sorted(model.state_dict().keys() - weights.keys())
    if missing:
        notes.append(f"not in the checkpoint, left untrained: {', '.join(missing)}.")
    for note in notes:
        log.info("%s: %s", path, note)
    return notes


def fit_weights(
    weights: dict[str, Tensor], model: nn.Module, source: str, same_classes: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit weights of the same architecture to `model`'s names, image size, channels and classes.

    LayerScale of the official DeiT III is renamed; position embeddings are resized with the papers' kernel; classifiers
    for another number of classes are replaced by the model's own, untrained; a classifier of tokens that the model does
    not have is left out.

    Returns:
        The weights, and what was done to them, one sentence each.

    Raises:
        ConfigError: the position embeddings are of no square grid, so that nothing tells how to resize them; another
            number of classes where `same_classes` are asked for.
    """
    own = model.state_dict()
    notes = []
    fitted = {re.sub(r"\bgamma_([12])$", r"ls\1.gamma", key): value for key, value in weights.items()}
    if fitted.keys() != weights.keys():
        notes.append("LayerScale renamed from gamma_1, gamma_2 to ls1.gamma, ls2.gamma.")
    if "pos_embed" in fitted and "pos_embed" in own and fitted["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        fitted["pos_embed"], note = _resize_positions(fitted["pos_embed"], model, source)
        notes.append(note)
    if (
        (key := "tokens_to_token.attention1.norm1.weight") in own
        and key in fitted
        and fitted[key].shape != own[key].shape
    ):
        notes.append(_adapt_first_windows(fitted, model))
    if not any(key.startswith("aux_head.") for key in own):
        extra = [key for key in fitted if key.startswith("aux_head.")]
        fitted = {key: value for key, value in fitted.items() if key not in extra}
        notes += ["classifier of tokens (aux_head) left out; model.token_head=true keeps it."] if extra else []
    heads = [key for key in fitted if key.rpartition(".")[0] in _head_names(model) and key in own]
    if any(fitted[key].shape[0] != own[key].shape[0] for key in heads):
        classes = {fitted[key].shape[0] for key in heads}, {own[key].shape[0] for key in heads}
        if same_classes:
            raise ConfigError(f"{source}: knows {max(classes[0])} classes, not {max(classes[1])}.")
        notes.append(
            f"{max(classes[0])} classes in the checkpoint, {max(classes[1])} in the model: "
            f"{', '.join(sorted({key.rpartition('.')[0] for key in heads}))} not loaded."
        )
        fitted.update({key: own[key] for key in heads})
    return fitted, notes


def _head_names(model: nn.Module) -> set[str]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return {*_HEADS, *((classifier,) if isinstance(classifier, str) else classifier)}


def _resize_positions(table: Tensor, model: Any, source: str) -> tuple[Tensor, str]:
    """Position embeddings (1, prefix + N, D) for another grid, as the official scripts resize them.

    Bicubic without antialiasing (coefficient -0.75); timm's own helper antialiases, which moves values by up to a third
    of their standard deviation.
    """
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = math.isqrt(table.shape[1] - prefix)
    new = model.patch_embed.grid_size
    if side * side != table.shape[1] - prefix:
        raise ConfigError(f"{source}: {table.shape[1]} position embeddings are of no square grid; cannot resize.")
    resized = resample_abs_pos_embed(table, list(new), [side, side], num_prefix_tokens=prefix, antialias=False)
    return resized, f"position embeddings resized from {side}x{side} to {new[0]}x{new[1]} (bicubic, not antialiased)."


def _adapt_first_windows(weights: dict[str, Tensor], model: Any) -> str:
    """Fit T2T-ViT's first layer, which sees windows of 7 x 7 pixels, to another number of image channels, in place.

    One channel gets the sum of the three projections, more get them repeated, as timm does for convolutions; the norm's
    weights are averaged or repeated.
    """
    channels, prefix = model.patch_embed.in_chans, "tokens_to_token.attention1."
    for name in ("kqv.weight", "attn.qkv.weight", "norm1.weight", "norm1.bias"):
        if (value := weights.get(prefix + name)) is not None:
            windows = value.reshape(-1, 3, 7, 7)  # channel-major
            adapted = adapt_input_conv(channels, windows)
            if name.startswith("norm1"):
                adapted = adapted * (channels / 3)  # undo the scale that keeps a convolution's sum
            weights[prefix + name] = adapted.flatten(1) if value.ndim == 2 else adapted.flatten()
    return f"first layer adapted from 3 to {channels} image channels."


def checkpoint_filter(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for pretrained weights: what `load_checkpoint` does to an official release."""
    return fit_weights(backbone_weights(checkpoint), model, source="model.pretrained")[0]


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow: Sequence[str] = ()) -> None:
    """Copy `weights` into `model`, all or nothing.

    Raises:
        ConfigError: as `load_checkpoint`; `source` is named in the message.
    """
    some_may_lack = check_weights(model, weights, source, allow)
    model.load_state_dict(weights, strict=not some_may_lack)


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow: Sequence[str] = ()) -> bool:
    """Compare names and shapes of `weights` with those of `model`; whether `allow` names any.

    Raises:
        ConfigError: as `load_checkpoint`; `source` is named in the message.
    """
    own = model.state_dict()
    shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    allowed = {key for pattern in allow for key in fnmatch.filter({*own, *weights}, pattern)}
    problems = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing keys", own.keys() - weights.keys() - allowed),
            ("unexpected keys", weights.keys() - own.keys() - allowed),
            ("tensors of another shape", shapes),
        )
        if keys
    ]
    if problems:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: {', '.join(problems)}.")
    return bool(allowed)
