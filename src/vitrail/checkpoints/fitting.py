"""Fit the weights of a checkpoint to a backbone: names, image size, channels and classes.

Shapes: N patch tokens, D channels, C classes.
"""

import fnmatch
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vitrail.checkpoints.classes import describe_difference
from vitrail.checkpoints.positions import fit_positions, position_tables
from vitrail.checkpoints.reading import Origin, backbone_weights, find_weights, origin_of, read_checkpoint
from vitrail.errors import ConfigError

log = logging.getLogger(__name__)

_HEADS = ("head", "head_dist", "aux_head", "second_order.visual_fc")
_PREFIX_TOKENS = {"cls_token": "class token", "dist_token": "distillation token", "reg_token": "register tokens"}


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    ema: bool | None = None,
    allow: Sequence[str] = (),
    same_classes: bool = False,
    key: str = "ckpt",
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Load the weights at `path` into the backbone `model`, after fitting them with `fit_weights`.

    Args:
        model: any backbone.
        path: checkpoint of vitrail, Lightning, timm (also .safetensors) or the official releases; or Google's .npz for
            a ViT.
        ema: see `find_weights`.
        allow: patterns of keys (`aux_head.*`) that may be missing or unexpected.
        same_classes: refuse a checkpoint without a classifier of the model's number of classes; False keeps the model's
            own classifier, untrained.
        key: config key of the file, for error messages.
        classes: names of the model's classes: a classifier that was trained for the same classes in another order is
            reordered, one for other classes is not loaded. None does not compare names.

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
    checkpoint = read_checkpoint(path, key=key)
    found, place = find_weights(checkpoint, ema, model.state_dict().keys())
    origin = origin_of(checkpoint, Path(path))
    weights, notes = fit_weights(found, model, f"{key}={path}", same_classes, origin, classes)
    load_weights(model, weights, source=f"{key}={path}", allow=allow)
    missing = sorted(model.state_dict().keys() - weights.keys())
    if missing:
        notes.append(f"not in the checkpoint, kept untrained: {', '.join(missing)}.")
    notes = place + notes
    for note in notes:
        log.info("%s: %s", path, note)
    return notes


def fit_weights(
    weights: dict[str, Tensor],
    model: nn.Module,
    source: str,
    same_classes: bool = False,
    origin: Origin | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit weights of the same architecture to `model`'s names, image size, channels and classes.

    A backbone may have `convert_checkpoint(weights, source)`, which maps the names of its official checkpoints to its
    own. LayerScale of the official DeiT III is renamed. Position embeddings are resized with the papers' kernel.
    Classifiers for other classes are replaced by the model's own, untrained, and so is a missing one. A classifier of
    tokens is dropped if the model has none.

    Args:
        weights: state dict with the backbone's names.
        model: the backbone.
        source: start of error messages: the config key and the file.
        same_classes: see `load_checkpoint`.
        origin: what the weights were trained for. If the image size is not known, the grid of the position embeddings
            is taken to be square.
        classes: see `load_checkpoint`.

    Returns:
        The weights, and the changes to them, one sentence each.

    Raises:
        ConfigError: the position embeddings have to be resized and their grid is not known; or the classes differ and
            `same_classes` is set; or one of the networks has a token that the other lacks.
    """
    own, origin = model.state_dict(), origin or Origin()
    notes = []
    convert: Any = getattr(model, "convert_checkpoint", None)
    if convert is not None:
        converted = convert(weights, source)
        if converted.keys() - weights.keys():
            notes.append(f"official names converted to those of {type(model).__name__}.")
        weights = converted
    renamed = {key: re.sub(r"\bgamma_([12])$", r"ls\1.gamma", key) for key in weights}
    fitted = {renamed[key] if renamed[key] in own else key: value for key, value in weights.items()}
    if fitted.keys() != weights.keys():
        notes.append("LayerScale renamed from gamma_1, gamma_2 to ls1.gamma, ls2.gamma.")
    _same_tokens(fitted, own, model, source)
    for table in position_tables(model):
        if table in fitted and table in own:
            fitted[table], note = fit_positions(table, fitted[table], own[table], model, source, origin)
            notes += [note] if note else []
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
    notes += _fit_heads(fitted, own, model, source, same_classes, origin.classes, classes)
    return fitted, notes


def _same_tokens(fitted: dict[str, Tensor], own: dict[str, Tensor], model: nn.Module, source: str) -> None:
    """Refuse weights with a class, distillation or register token that the model lacks, or without one that it has."""
    tables = fitted.get("pos_embed"), own.get("pos_embed")
    if tables[0] is None or tables[1] is None or tables[0].shape[1] == tables[1].shape[1]:
        return
    for name, words in _PREFIX_TOKENS.items():
        if (name in fitted) != (name in own):
            has, lacks = ("has", "lacks") if name in fitted else ("lacks", "needs")
            raise ConfigError(
                f"{source}: {has} the {words} that {type(model).__name__} {lacks}; choose the model of these weights."
            )


def _fit_heads(
    fitted: dict[str, Tensor],
    own: dict[str, Tensor],
    model: nn.Module,
    source: str,
    same_classes: bool,
    recorded: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> list[str]:
    """Keep, reorder or replace the classifiers among `fitted`, in place; return what was done."""
    names = sorted(name for name in head_names(model) if f"{name}.weight" in own)
    listed = ", ".join(names)
    heads = [key for key in fitted if key.rpartition(".")[0] in names and key in own]
    missing = [key for key in own if key.rpartition(".")[0] in names and key not in fitted]
    main = [name for name in names if name != "aux_head"]
    if main and not any(f"{name}.weight" in fitted for name in main):
        if same_classes:
            raise ConfigError(f"{source}: contains no classifier; use a checkpoint of a trained classifier.")
        fitted.update({key: own[key] for key in missing})
        return [f"no classifier in the checkpoint: {listed} kept untrained."]
    counts = {fitted[key].shape[0] for key in heads}, {own[key].shape[0] for key in heads}
    note = ""
    if any(fitted[key].shape[0] != own[key].shape[0] for key in heads):
        if same_classes:
            raise ConfigError(
                f"{source}: has {max(counts[0])} classes, the model has {max(counts[1])};"
                " use a checkpoint with the same classes."
            )
        note = f"{max(counts[0])} classes in the checkpoint, {max(counts[1])} in the model: {listed} not loaded."
    elif classes is not None and recorded is not None and list(recorded) != list(classes):
        if set(recorded) == set(classes):
            order = [list(recorded).index(name) for name in classes]
            fitted.update({key: fitted[key][order] for key in heads})
            return [f"the classes are in another order: {listed} reordered."]
        note = f"{describe_difference(recorded, classes)}: {listed} not loaded."
    if note:
        fitted.update({key: own[key] for key in heads})
        return [note]
    if heads and classes is not None and recorded is None:
        return [f"class names are not recorded: {listed} kept, taken to be for the data's classes in their order."]
    return []


def head_names(model: nn.Module) -> set[str]:
    """Return the names of a backbone's classifiers: the usual names, or else its last layer with C outputs."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    named = {*_HEADS, *((classifier,) if isinstance(classifier, str) else classifier)}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if named & linear.keys():
        return named
    outputs = {name: getattr(module, "out_features", 0) for name, module in linear.items()}
    last = [name for name, count in outputs.items() if count and count == getattr(model, "num_classes", None)]
    return {*named, *last[-1:]}


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
    weights = backbone_weights(checkpoint, names=model.state_dict().keys())
    return fit_weights(weights, model, source="model.pretrained")[0]


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
