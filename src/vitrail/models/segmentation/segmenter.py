"""Networks of semantic segmentation: any backbone with spatial features, a pyramid and a decoder.

Names follow mmsegmentation's layout (`backbone`, `neck`, `decode_head`, `auxiliary_head`), and the official LV-ViT
checkpoints (github.com/zihangJiang/TokenLabeling, `seg/`) load; there the pyramid is part of the backbone.

Shapes: B images, C classes, D channels, H x W pixels, h x w positions of the logits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from vitrail.checkpoints.positions import fit_positions
from vitrail.checkpoints.reading import Origin
from vitrail.errors import ConfigError
from vitrail.models.factory import create_model
from vitrail.models.features import intermediate_shapes, unused_tokens
from vitrail.models.segmentation.decoders import FCNHead, LinearHead, UPerHead, resize_map
from vitrail.models.segmentation.pyramids import PYRAMIDS
from vitrail.types import ImageSize, Outputs
from vitrail_runtime.checking import NonNegativeInt, Positive, PositiveInt, Rate, checked

_LEVELS = 4


class Segmenter(nn.Module):
    """Network of semantic segmentation.

    `forward_outputs` gives the decoder's logits as `cls` (B, C, h, w), and in training those of the auxiliary head as
    `auxiliary`; `model(images)` gives logits (B, C, H, W) at the size of the images.

    Args:
        backbone: backbone of timm or vitrail, without a classifier.
        taps: indices of the feature maps that are used.
        neck: pyramid.
        decode_head: maps features to logits.
        num_classes: number of classes, C.
        auxiliary_head: second decoder of one map, for training; None for none.
        auxiliary_map: index of that map.
        norm: apply the backbone's last norm to every map.
        frozen: keep the backbone as it is, in evaluation mode.
    """

    outputs = frozenset({"masks"})

    def __init__(
        self,
        backbone: nn.Module,
        taps: Sequence[int],
        neck: nn.Module,
        decode_head: nn.Module,
        num_classes: int,
        auxiliary_head: nn.Module | None = None,
        auxiliary_map: int = 2,
        norm: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.decode_head = backbone, neck, decode_head
        self.auxiliary_head, self.auxiliary_map = auxiliary_head, auxiliary_map
        self.taps, self.num_classes, self.norm, self.frozen = tuple(taps), num_classes, norm, frozen
        heads = ("decode_head", *(() if auxiliary_head is None else ("auxiliary_head",)))
        self.pretrained_cfg = {"classifier": tuple(f"{name}.conv_seg" for name in heads)}
        self.new_modules = (*heads, "neck")
        if frozen:
            backbone.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Segmenter":
        """Set the mode of all modules; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's maps (B, D, rows, columns) for images (B, 3, H, W)."""
        backbone: Any = self.backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return backbone.forward_intermediates(
                images, indices=list(self.taps), norm=self.norm, output_fmt="NCHW", intermediates_only=True
            )

    def forward_outputs(self, images: Tensor) -> Outputs:
        """Return the logits (B, C, h, w) for images (B, 3, H, W), and in training the auxiliary head's."""
        maps = self.neck(self.features(images))
        extras = {}
        if self.training and self.auxiliary_head is not None:
            extras["auxiliary"] = self.auxiliary_head(maps[self.auxiliary_map])
        return Outputs(self.decode_head(maps), extras=extras)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C, H, W) for images (B, 3, H, W)."""
        return resize_map(self.forward_outputs(images).cls, images.shape[-2:])

    # What optimisers and checkpoints ask for

    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters without weight decay."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Return the layer of a parameter by its name, for layer decay; pyramid and decoders are the last layer."""
        backbone: Any = self.backbone
        layers = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
        return lambda name: layers.get(name.removeprefix("backbone."), math.inf)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return pyramid and decoders, which are trained at the full learning rate."""
        return tuple(getattr(self, name) for name in self.new_modules)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def convert_checkpoint(self, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Convert the names of official LV-ViT checkpoints, and resize the position table.

        Args:
            weights: state dict.
            source: start of error messages: the config key and the file.

        Raises:
            ConfigError: the position table does not fit.
        """
        renamed = {
            key.replace("backbone.side_layer", "neck.side_layer", 1): value
            for key, value in weights.items()
            if not key.startswith("backbone.norm.") or self.norm
        }
        key, own = "backbone.pos_embed", self.state_dict()
        if key in renamed and key in own:
            renamed[key], _ = fit_positions("pos_embed", renamed[key], own[key], self.backbone, source, Origin())
        return renamed


def _tapped(
    name: str,
    img_size: ImageSize | None,
    taps: Sequence[int] | None,
    levels: int,
    norm: bool,
    arguments: dict[str, Any],
) -> tuple[Any, list[int], list[tuple[int, ...]]]:
    """Build a backbone without classifier, and return the indices and shapes (1, D, rows, columns) of its maps.

    Raises:
        ConfigError: the backbone has no spatial features, or too few.
    """
    backbone: Any = create_model(name, 0, img_size, **arguments)
    count = len(getattr(backbone, "feature_info", ()))
    if not count or not hasattr(backbone, "forward_intermediates"):
        raise ConfigError(
            f"model.name={name}: has no spatial features (forward_intermediates); choose another backbone."
        )
    if count < levels:
        raise ConfigError(f"model.name={name}: has {count} blocks, segmentation needs at least {levels}.")
    found = list(taps) if taps is not None else _default_taps(backbone, count, levels)
    if wrong := [tap for tap in found if not 0 <= tap < count]:
        raise ConfigError(f"model.taps: {wrong[0]} is not a block of {name}, whose blocks are 0 to {count - 1}.")
    if len(found) != levels or sorted(set(found)) != found:
        raise ConfigError(f"model.taps={found}: must be {levels} different blocks in ascending order.")
    backbone.prune_intermediate_layers(found, prune_norm=not norm, prune_head=True)
    return backbone, found, _shapes_and_unused(backbone, found, img_size or 224, norm)


def _shapes_and_unused(
    backbone: nn.Module, taps: Sequence[int], img_size: ImageSize, norm: bool
) -> list[tuple[int, ...]]:
    """Return the shapes of the feature maps, and freeze the parts of the backbone that they do not depend on.

    DDP would wait for the gradients of such parts: second-order classifiers, predictors of token pruning, and the class
    token of timm 1.0.23's VOLO.
    """
    called: set[nn.Module] = set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(module)

    handles = [module.register_forward_hook(note) for module in backbone.modules()]
    shapes = intermediate_shapes(backbone, taps, img_size, norm)
    for handle in handles:
        handle.remove()
    for child in backbone.children():
        if not called & set(child.modules()):
            child.requires_grad_(False)
    for token in unused_tokens(backbone, taps, img_size, norm):
        token.requires_grad_(False)
    return shapes


def _default_taps(backbone: nn.Module, count: int, levels: int) -> list[int]:
    """Return the last stages of a hierarchical backbone, or every third block of a ViT from its end."""
    reductions = {info["reduction"] for info in backbone.feature_info}  # type: ignore[union-attr]
    step = 1 if len(reductions) > 1 else max(1, min(3, count // levels))
    return [count - 1 - step * number for number in reversed(range(levels))]


@checked
def upernet(
    name: str,
    num_classes: PositiveInt,
    img_size: ImageSize | None = None,
    pyramid: Literal["auto", "lvvit", "beit", "mln", "none"] = "auto",
    taps: Sequence[NonNegativeInt] | None = None,
    channels: PositiveInt = 256,
    auxiliary_channels: PositiveInt | None = 256,
    auxiliary_map: NonNegativeInt = 2,
    dropout: Rate = 0.1,
    mlp_dropout: Rate | None = None,
    norm_eps: Positive | None = None,
    **arguments: Any,
) -> Segmenter:
    """Build UperNet (arXiv:1807.10221) on a backbone of timm or vitrail.

    Args:
        name: timm's name of the backbone.
        num_classes: number of classes, C.
        img_size: side of the input in pixels, or (height, width).
        pyramid: how a ViT's maps get several resolutions: `lvvit`, `beit`, `mln` (mmsegmentation's neck for DeiT) or
            `none`; `auto` is `lvvit` for backbones with one resolution and `none` for others.
        taps: indices of the four blocks, from 0; None means every third from the end.
        channels: width of the decoder.
        auxiliary_channels: width of the auxiliary head; None omits the head.
        auxiliary_map: map of the auxiliary head.
        dropout: dropout before the classifiers.
        mlp_dropout: dropout inside the last block's MLP, rising linearly from 0 in the first, as LV-ViT's published
            code applies its `drop_path_rate`; use it with `drop_path_rate=0`.
        norm_eps: epsilon of the backbone's LayerNorms; None means the backbone's.
        arguments: arguments of `create_model`, such as `drop_path_rate`.

    Raises:
        ConfigError: the backbone has no spatial features, or an option does not fit it.
    """
    backbone, found, shapes = _tapped(name, img_size, taps, _LEVELS, norm=False, arguments=arguments)
    if pyramid == "auto":
        pyramid = "lvvit" if len({shape[2:] for shape in shapes}) == 1 else "none"
    if auxiliary_map >= _LEVELS:
        raise ConfigError(f"model.auxiliary_map={auxiliary_map}: there are {_LEVELS} maps, 0 to {_LEVELS - 1}.")
    neck = PYRAMIDS[pyramid]([shape[1] for shape in shapes])
    widths: tuple[int, ...] = neck.widths  # type: ignore[assignment]
    auxiliary = None
    if auxiliary_channels is not None:
        auxiliary = FCNHead(widths[auxiliary_map], auxiliary_channels, num_classes, dropout)
    _set_mlp_dropout(backbone, name, mlp_dropout)
    for module in backbone.modules() if norm_eps is not None else ():
        if isinstance(module, nn.LayerNorm):
            module.eps = float(norm_eps)  # type: ignore[arg-type]
    decoder = UPerHead(widths, channels, num_classes, dropout=dropout)
    return Segmenter(backbone, found, neck, decoder, num_classes, auxiliary, auxiliary_map)


def _set_mlp_dropout(backbone: Any, name: str, rate: float | None) -> None:
    """Set the dropout after the activation and after the second layer of each block's MLP, rising with depth."""
    if rate is None:
        return
    blocks = list(getattr(backbone, "blocks", ()))
    for number, block in enumerate(blocks):
        drops = [getattr(getattr(block, "mlp", None), drop, None) for drop in ("drop1", "drop2")]
        if None in drops:
            raise ConfigError(f"model.mlp_dropout: {name} has no timm MLPs; omit it.")
        for drop in drops:
            drop.p = rate * number / max(1, len(blocks) - 1)  # type: ignore[union-attr]
    if not blocks:
        raise ConfigError(f"model.mlp_dropout: {name} has no blocks; omit it.")


@checked
def linear_segmenter(
    name: str,
    num_classes: PositiveInt,
    img_size: ImageSize | None = None,
    taps: Sequence[NonNegativeInt] | None = None,
    norm: bool = True,
    dropout: Rate = 0.1,
    frozen: bool = True,
    **arguments: Any,
) -> Segmenter:
    """Build a linear classifier of the positions of a backbone's last map, as DINOv3 evaluates frozen features.

    Args:
        name: timm's name of the backbone.
        num_classes: number of classes, C.
        img_size: side of the input in pixels, or (height, width).
        taps: index of the block, from 0; None means the last.
        norm: apply the backbone's last norm.
        dropout: dropout of whole channels before the classifier.
        frozen: keep the backbone as it is.
        arguments: arguments of `create_model`.

    Raises:
        ConfigError: the backbone has no spatial features.
    """
    levels = 1 if taps is None else max(1, len(taps))
    backbone, found, shapes = _tapped(name, img_size, taps, levels, norm=norm, arguments=arguments)
    widths = [shape[1] for shape in shapes]
    decoder = LinearHead(widths, num_classes, dropout)
    neck = PYRAMIDS["none"](widths)
    return Segmenter(backbone, found, neck, decoder, num_classes, norm=norm, frozen=frozen)
