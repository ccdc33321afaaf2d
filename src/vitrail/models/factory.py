"""Build a backbone by its timm name."""

import difflib
import os
import socket
from typing import Any, Literal
from urllib.parse import urlparse

import huggingface_hub
import timm
from timm.layers import DropPath
from torch import nn

from vitrail.errors import ConfigError
from vitrail.models.heads import add_token_head
from vitrail.models.second_order_head import add_second_order_head
from vitrail.models.tokens_to_token import TokensToToken
from vitrail.models.volo import declare_token_logits
from vitrail.types import ImageSize, height_width
from vitrail_runtime.checking import NonNegativeInt, PositiveInt, Rate, checked


@checked
def create_model(
    name: str,
    num_classes: NonNegativeInt,
    img_size: ImageSize | None = None,
    token_head: bool = False,
    pool: Literal["second_order"] | None = None,
    constant_drop_path: bool = False,
    drop_path_rate: Rate | None = None,
    drop_rate: Rate | None = None,
    patch_size: ImageSize | None = None,
    in_chans: PositiveInt | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the backbone that timm or vitrail registers as `name`.

    Args:
        name: any name in `timm.list_models()`.
        num_classes: outputs of the classifier; 0 omits the classifier.
        img_size: side of the input in pixels, or (height, width). Passed only to backbones whose weights depend on it
            (ViTs); convolutional networks do not accept it.
        token_head: add a classifier of patch tokens, as token labelling needs; works for any ViT.
        pool: "second_order" adds a classifier of the covariance of the patch tokens, as in So-ViT; works for ViTs with
            one classifier. None keeps timm's pooling.
        constant_drop_path: use `drop_path_rate` in every block, as DeiT-III does, instead of a linear ramp from 0.
        drop_path_rate: probability of dropping the last block (stochastic depth); None means timm's default.
        drop_rate: dropout of the classifier's input; None means timm's default.
        patch_size: side of the patches in pixels; None means the backbone's.
        in_chans: channels of the images; None means 3.
        pretrained: download timm's weights.
        kwargs: timm's other arguments; None means timm's default.

    Raises:
        ConfigError: the name is unknown, or the backbone does not accept one of the arguments.
    """
    _check_name(name)
    fixed_size = has_fixed_size(name)
    created = _create(
        name,
        kwargs,
        num_classes=num_classes,
        img_size=height_width(img_size) if fixed_size and img_size is not None else None,
        drop_path_rate=drop_path_rate,
        drop_rate=drop_rate,
        patch_size=patch_size,
        in_chans=in_chans,
        pretrained=pretrained,
    )
    model = declare_token_logits(created)
    patch = getattr(model, "patch_embed", None)
    if fixed_size and img_size is not None and not isinstance(patch, TokensToToken):  # T2T pads: any size works
        _check_patches(name, img_size, getattr(patch, "patch_size", None) or getattr(model, "patch_size", None))
    if constant_drop_path:
        _make_drop_path_constant(model, drop_path_rate or 0.0)
    if pool is not None:
        model = add_second_order_head(model)
    return add_token_head(model) if token_head else model


def has_fixed_size(name: str) -> bool:
    """Return whether the weights of timm's backbone `name` depend on the image size, so that it takes `img_size`."""
    cfg = timm.get_pretrained_cfg(name)  # None for functions that were registered without one
    return cfg is not None and bool(cfg.fixed_input_size)


def _check_name(name: str) -> None:
    """Refuse a name that timm does not list, and suggest similar ones.

    Names that timm has renamed are not listed, and have no configuration that tells their image size.
    """
    known = timm.list_models()
    if name.partition(".")[0] in known:
        return
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() shows all."
    raise ConfigError(f"model.name={name}: no such backbone{hint}")


def _create(name: str, options: dict[str, Any], pretrained: bool, **arguments: Any) -> nn.Module:
    """Call `timm.create_model`, and report its errors in one sentence.

    Args:
        name: name in timm.
        options: arguments that only some backbones accept; error messages show them.
        pretrained: download timm's weights.
        arguments: arguments that most backbones accept.

    Raises:
        ConfigError: the weights cannot be downloaded, or the backbone does not accept one of the arguments.
    """
    if pretrained:
        skip_hopeless_downloads()
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments, **options)
    except OSError as error:  # also the errors of the Hugging Face Hub and of requests
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.name={name}: its pretrained weights could not be downloaded and are not in the cache"
            f" ({reason.rstrip('.')}); connect to the network once, or load a file with init_from=..."
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"model.{key}={value}" for key, value in options.items() if value is not None)
        reason = str(error) or type(error).__name__
        raise ConfigError(f"model.name={name}: {reason}{f' ({given})' if given else ''}") from error


def _make_drop_path_constant(model: nn.Module, rate: float) -> None:
    """Use the same stochastic depth in all blocks.

    The modules are replaced, because timm's first block has an identity without a rate.
    """
    names = [
        (block, name)
        for block in model.modules()
        for name in ("drop_path", "drop_path1", "drop_path2")
        if isinstance(getattr(block, name, None), nn.Module)
    ]
    if not names:
        raise ConfigError(
            f"model.constant_drop_path=true: {type(model).__name__} has no stochastic depth; set it to false."
        )
    for block, name in names:
        setattr(block, name, DropPath(rate) if rate else nn.Identity())


def skip_hopeless_downloads(timeout: float = 3.0) -> None:
    """Let the Hugging Face Hub use its cache only if its server cannot be reached, which otherwise takes a minute."""
    server = urlparse(os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT)
    if {"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"} & os.environ.keys():
        return  # the proxy may reach it
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname or "", port), timeout).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _check_patches(name: str, img_size: ImageSize, patch_size: ImageSize | None) -> None:
    """Refuse image sizes that the patch size does not divide: timm would silently crop the border."""
    sides = height_width(img_size)
    shown = sides[0] if sides[0] == sides[1] else list(sides)
    if patch_size is None:
        return
    patches = height_width(patch_size)
    if any(side % patch for side, patch in zip(sides, patches, strict=True)):
        patch = "x".join(map(str, dict.fromkeys(patches)))
        raise ConfigError(
            f"data.image_size={shown}: {name} needs a multiple of its patch size {patch}; "
            "change data.image_size or model.patch_size."
        )
