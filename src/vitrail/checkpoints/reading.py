"""Read the weights of a backbone from a checkpoint of any supported format, and fit them to a model.

Shapes: N patch tokens, D channels.
"""

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

from vitrail.checkpoints.shards import join_shards
from vitrail.errors import ConfigError

log = logging.getLogger(__name__)

# Keys of EMA weights and of raw weights in the files of other frameworks.
_EMA_KEYS = ("state_dict_ema", "model_ema")
_RAW_KEYS = ("state_dict", "model")
_HEADS = ("head", "head_dist", "aux_head")


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{key}={path}: not a checkpoint that can be loaded safely ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"{key}={path}: contains a {type(checkpoint).__name__}, not a checkpoint.")
    return join_shards(checkpoint, path, key=key) if values else checkpoint


def backbone_weights(checkpoint: dict[str, Any], ema: bool | None = None) -> dict[str, Tensor]:
    """Return the backbone's state dict from a checkpoint of vitrail, timm, an official release, or a bare state dict.

    Args:
        checkpoint: result of `read_checkpoint`.
        ema: True selects the EMA weights, False the raw weights, None the EMA weights if there are any.

    Raises:
        ConfigError: `ema` is True and the checkpoint has no EMA weights.
    """
    if "pytorch-lightning_version" in checkpoint:
        has_ema = "current_model_state" in checkpoint  # Lightning's averaging stores the EMA weights as `state_dict`
        if ema and not has_ema:
            raise ConfigError("weights=ema: the checkpoint contains no EMA weights; use weights=raw.")
        weights = checkpoint["current_model_state" if has_ema and ema is False else "state_dict"]
        return {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    ema_sets = [checkpoint[key] for key in _EMA_KEYS if checkpoint.get(key) is not None]
    raw = [checkpoint[key] for key in _RAW_KEYS if isinstance(checkpoint.get(key), dict)]
    if ema and not ema_sets:
        raise ConfigError("weights=ema: the checkpoint contains no EMA weights; use weights=raw.")
    weights = (ema_sets or raw or [checkpoint])[0] if ema is not False else (raw or [checkpoint])[0]
    return {key.removeprefix("module."): value for key, value in weights.items()}


def weight_sets(checkpoint: dict[str, Any]) -> list[str]:
    """Return the kinds of weights in a checkpoint: `raw`, `ema` or both, in this order."""
    if "pytorch-lightning_version" in checkpoint:
        return ["raw", "ema"] if "current_model_state" in checkpoint else ["raw"]
    has_ema = any(checkpoint.get(key) is not None for key in _EMA_KEYS)
    raw = any(isinstance(checkpoint.get(key), dict) for key in _RAW_KEYS)
    return ["raw"] * (raw or not has_ema) + ["ema"] * has_ema


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    ema: bool | None = None,
    allow: Sequence[str] = (),
    same_classes: bool = False,
    key: str = "ckpt",
) -> list[str]:
    """Load the weights at `path` into the backbone `model`, after fitting them with `fit_weights`.

    Args:
        model: any backbone.
        path: checkpoint of vitrail, Lightning, timm (also .safetensors) or the official releases; or Google's .npz for
            a ViT.
        ema: see `backbone_weights`.
        allow: patterns of keys (`aux_head.*`) that may be missing or unexpected.
        same_classes: refuse a classifier with another number of classes; False keeps the model's own, untrained.
        key: config key of the file, for error messages.

    Returns:
        The changes to the weights, one sentence each; also logged.

    Raises:
        ConfigError: keys are missing or unexpected, or a tensor has another shape (the architecture differs).
    """
    if Path(path).suffix == ".npz" and hasattr(model, "load_pretrained"):
        if not Path(path).is_file():
            raise ConfigError(f"{key}={path}: no such file. Check the path.")
        reader: Any = model
        reader.load_pretrained(str(path))  # timm's reader of the JAX releases, with its own resizing of positions
        return []
    weights, notes = fit_weights(
        backbone_weights(read_checkpoint(path, key=key), ema), model, f"{key}={path}", same_classes
    )
    load_weights(model, weights, source=f"{key}={path}", allow=allow)
    missing = sorted(model.state_dict().keys() - weights.keys())
    if missing:
        notes.append(f"not in the checkpoint, kept untrained: {', '.join(missing)}.")
    for note in notes:
        log.info("%s: %s", path, note)
    return notes


def fit_weights(
    weights: dict[str, Tensor], model: nn.Module, source: str, same_classes: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit weights of the same architecture to `model`'s names, image size, channels and classes.

    LayerScale of the official DeiT III is renamed. Position embeddings are resized with the papers' kernel. Classifiers
    with another number of classes are replaced by the model's own, untrained. A classifier of tokens is dropped if the
    model has none.

    Returns:
        The weights, and the changes to them, one sentence each.

    Raises:
        ConfigError: the position embeddings have to be resized and do not form a square grid; or the number of classes
            differs and `same_classes` is set.
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
        notes += ["classifier of tokens (aux_head) dropped; model.token_head=true keeps it."] if extra else []
    heads = [key for key in fitted if key.rpartition(".")[0] in _head_names(model) and key in own]
    if any(fitted[key].shape[0] != own[key].shape[0] for key in heads):
        classes = {fitted[key].shape[0] for key in heads}, {own[key].shape[0] for key in heads}
        if same_classes:
            raise ConfigError(
                f"{source}: has {max(classes[0])} classes, the model has {max(classes[1])};"
                " use a checkpoint with the same classes."
            )
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
    """Resize position embeddings (1, prefix + N, D) to another grid, as the official scripts do.

    Bicubic without antialiasing (coefficient -0.75). timm's default antialiases, which changes values by up to a third
    of their standard deviation.
    """
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = math.isqrt(table.shape[1] - prefix)
    new = model.patch_embed.grid_size
    if side * side != table.shape[1] - prefix:
        raise ConfigError(
            f"{source}: {table.shape[1]} position embeddings do not form a square grid and cannot be resized;"
            " use the image size of the checkpoint."
        )
    resized = resample_abs_pos_embed(table, list(new), [side, side], num_prefix_tokens=prefix, antialias=False)
    return resized, f"position embeddings resized from {side}x{side} to {new[0]}x{new[1]} (bicubic, not antialiased)."


def _adapt_first_windows(weights: dict[str, Tensor], model: Any) -> str:
    """Fit T2T-ViT's first layer, whose input is windows of 7 x 7 pixels, to another number of channels, in place.

    For one channel the three projections are summed, for more they are repeated, as timm does for convolutions. The
    norm's weights are averaged or repeated.
    """
    channels, prefix = model.patch_embed.in_chans, "tokens_to_token.attention1."
    for name in ("kqv.weight", "attn.qkv.weight", "norm1.weight", "norm1.bias"):
        if (value := weights.get(prefix + name)) is not None:
            windows = value.reshape(-1, 3, 7, 7)  # channel-major
            adapted = adapt_input_conv(channels, windows)
            if name.startswith("norm1"):
                adapted = adapted * (channels / 3)  # undo the scale that preserves a convolution's sum
            weights[prefix + name] = adapted.flatten(1) if value.ndim == 2 else adapted.flatten()
    return f"first layer adapted from 3 to {channels} image channels."


def checkpoint_filter(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Fit pretrained weights to `model`, as timm's `pretrained_filter_fn`."""
    return fit_weights(backbone_weights(checkpoint), model, source="model.pretrained")[0]


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow: Sequence[str] = ()) -> None:
    """Copy `weights` into `model`, or raise before anything is copied.

    Raises:
        ConfigError: as `load_checkpoint`; the message names `source`.
    """
    some_allowed = check_weights(model, weights, source, allow)
    model.load_state_dict(weights, strict=not some_allowed)


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow: Sequence[str] = ()) -> bool:
    """Compare names and shapes of `weights` with those of `model`; return whether `allow` matches any key.

    Raises:
        ConfigError: as `load_checkpoint`; the message names `source`.
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
