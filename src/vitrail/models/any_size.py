"""Let a ViT, ViT-5, DINOv3 or VOLO run at several image sizes with one position table.

The table keeps the grid of the image size that the network was built for, and the forward pass resizes it for images of
another size. Optimiser state, EMA weights and checkpoints therefore always have the table's own shape, and strategies
that hold on to parameters (DDP, FSDP) never see one replaced. The resize is linear with antialiasing, written as a
matrix product: every cell of the table gets a gradient at every size, and the backward pass is deterministic.

EfficientTrain instead replaces table and moments by resized ones at each change of size.

Shapes: B images, N patch tokens, D channels, H x W pixels, h x w cells of the token grid.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.format import Format
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrail.models.volo import TokenVOLO


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Resize a position table (1, prefix + h * w, D) from a grid `old` to a grid `new` of (rows, columns)."""
    if old == new:
        return table
    device = table.device.type
    with nullcontext() if table.is_meta else torch.autocast(device, enabled=False):
        grid = table[:, prefix:].float().unflatten(1, old)[0]  # (h, w, D)
        rows, columns = (_resize_matrix(*sides, grid.device) for sides in zip(old, new, strict=True))
        grid = (rows @ grid.flatten(1)).unflatten(1, (old[1], -1))  # (new h, w, D)
        grid = (columns @ grid).flatten(0, 1)[None]  # (1, new h * new w, D)
    return torch.cat((table[:, :prefix], grid.to(table.dtype)), 1)


@torch.no_grad()
def _resize_matrix(old: int, new: int, device: torch.device) -> Tensor:
    """Return the matrix (new, old) that resizes a line of `old` values linearly, antialiased if it gets shorter."""
    lines = torch.eye(old, device=device)[None, None]
    return F.interpolate(lines, (old, new), mode="bilinear", antialias=True)[0, 0].T.contiguous()


class AnySizeViT(VisionTransformer):
    """Mixin for timm's ViTs that resizes the position table to the grid of the images.

    List it before the backbone's class among the bases.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions and prefix tokens to patches (B, h, w, D); return tokens (B, prefix + N, D)."""
        tokens = (getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token"))
        prefix = [token.expand(len(x), -1, -1) for token in tokens if token is not None]
        grid, patches = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        if self.pos_embed is None:
            return self.pos_drop(torch.cat((*prefix, patches), 1))
        count = 0 if self.no_embed_class else self.num_prefix_tokens
        table = resize_positions(self.pos_embed, self.patch_embed.grid_size, grid, count)
        if self.no_embed_class:
            return self.pos_drop(torch.cat((*prefix, patches + table), 1))
        return self.pos_drop(torch.cat((*prefix, patches), 1) + table)


class AnySizeEva(Eva):
    """Mixin for timm's EVA family (ViT-5, DINOv3) that resizes the position table and the rotation.

    List it before the backbone's class among the bases.
    """

    @property
    def pos_embed(self) -> None:
        """None for timm's code, which would resize the table in its own way; the table stays a parameter."""

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add positions and prefix tokens to patches (B, h, w, D); return tokens (B, prefix + N, D) and rotations."""
        table, grid = self._parameters.get("pos_embed"), (x.shape[1], x.shape[2])
        if table is not None:
            x = x + resize_positions(table, self.patch_embed.grid_size, grid, 0).unflatten(1, grid)
        if getattr(self.rope, "feat_shape", None) not in (None, grid):  # timm keeps the rotation of one grid
            self.rope.update_feat_shape(grid)
        return super()._pos_embed(x)


class AnySizeVOLO(TokenVOLO):
    """Mixin for VOLO that resizes the position table to the grid of the images."""

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, D) of a map of patches (B, h, w, D)."""
        for index, block in enumerate(self.network):
            if index == 2:  # timm adds the positions here, after the outlookers and their downsampling
                own, grid = self.pos_embed.shape[1:3], (x.shape[1], x.shape[2])
                table = resize_positions(self.pos_embed.flatten(1, 2), (own[0], own[1]), grid, 0)
                x = self.pos_drop(x + table.unflatten(1, grid))
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x.flatten(1, 2)


_KNOWN = (VisionTransformer._pos_embed, VisionTransformerDistilled._pos_embed)


def allow_any_size(model: nn.Module) -> nn.Module:
    """Let a ViT, ViT-5, DINOv3 or VOLO run at every image size that its patches divide, in place.

    Other models are returned unchanged.

    The class becomes a subclass; weights, and logits at the image size of the position table, stay the same.
    """
    vit: Any = model
    backbone: Any = type(model)
    mixin: type | None = None
    if isinstance(model, VisionTransformer) and backbone._pos_embed in _KNOWN:
        mixin = AnySizeViT
    elif isinstance(model, Eva) and (vit.pos_embed is None or vit.no_embed_class):
        mixin = AnySizeEva
    elif isinstance(model, TokenVOLO):
        vit.__class__ = _with_any_size(AnySizeVOLO, backbone)
    if mixin is not None:
        vit.__class__ = _with_any_size(mixin, backbone)
        vit.dynamic_img_size = True
        vit.patch_embed.strict_img_size = False
        vit.patch_embed.flatten, vit.patch_embed.output_fmt = False, Format.NHWC
    return model


@cache
def _with_any_size(mixin: Any, backbone: Any) -> Any:
    return type(f"{backbone.__name__}AtAnySize", (mixin, backbone), {})
