"""Class, token and distillation logits of a backbone, and MixToken."""

from functools import cache, partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.types import TOKEN_WEIGHT, Heads


class DenseHead(VisionTransformer):
    """Adds to a ViT a second classifier, `aux_head`, that every patch token goes through.

    To be put before the backbone's class among the bases. The logits of an image become those of its class token (or
    pooled tokens) plus half the maximum over the tokens, as LV-ViT evaluates (Jiang et al., arXiv:2104.10858).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset_aux_head()

    def reset_aux_head(self) -> None:
        """Draw a new classifier of tokens."""
        weight = next(self.parameters())  # for device and precision
        self.aux_head: nn.Module = nn.Identity()
        if self.num_classes > 0:
            self.aux_head = nn.Linear(self.embed_dim, self.num_classes, device=weight.device, dtype=weight.dtype)
            trunc_normal_(self.aux_head.weight, std=0.02)
            nn.init.zeros_(self.aux_head.bias)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """All classifiers, that of tokens last."""
        others = super().get_classifier()
        return (*(others if isinstance(others, tuple) else (others,)), self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Draw new classifiers, all of them, for another number of classes."""
        super().reset_classifier(num_classes, global_pool)
        self.reset_aux_head()

    def token_logits(self, features: Tensor) -> Tensor:
        """Logits (B, N, C) of the patch tokens, from what `forward_features` gives (B, prefix + N, D)."""
        return self.aux_head(self.fc_norm(features[:, self.num_prefix_tokens :]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of images (B, C) from features (B, prefix + N, D); `pre_logits` gives the pooled features (B, D)."""
        logits = super().forward_head(x, pre_logits=pre_logits)
        if pre_logits or self.num_classes == 0:
            return logits
        return logits + TOKEN_WEIGHT * self.token_logits(x).amax(1)


@cache
def _with_dense_head(backbone: type[VisionTransformer]) -> type[DenseHead]:
    return type(f"Dense{backbone.__name__}", (DenseHead, backbone), {})


def add_dense_head(model: nn.Module) -> nn.Module:
    """Give a ViT, DeiT or T2T-ViT token logits, which token labelling needs; LV-ViT has them already.

    The model stays what it was, timm's methods included, and gains `aux_head`: its class becomes a subclass.

    Raises:
        ConfigError: the backbone has no patch tokens.
    """
    if isinstance(model, DenseHead):
        return model
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"model.dense_head=true: {type(model).__name__} has no patch tokens; choose a ViT.")
    backbone: Any = type(model)
    model.__class__ = _with_dense_head(backbone)
    assert isinstance(model, DenseHead)
    model.reset_aux_head()
    return model


_SEVERAL_HEADS = (DenseHead, VisionTransformerDistilled)


def mix_tokens(x: Tensor, box: Tensor, grid: tuple[int, int]) -> Tensor:
    """Swap the tokens inside a box with those of the batch's mirror image: sample i with sample B - 1 - i.

    Applied twice, it gives its input back.

    Args:
        x: tokens (B, N, D) of a grid in row-major order, or (B, h, w, D).
        box: (4,) integers top, left, bottom, right in cells; bottom and right are outside the box.
        grid: rows and columns (h, w).
    """
    rows = torch.arange(grid[0], device=x.device)[:, None]
    columns = torch.arange(grid[1], device=x.device)[None, :]
    top, left, bottom, right = box.to(x.device).unbind()
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    inside = inside.flatten()[:, None] if x.ndim == 3 else inside[:, :, None]
    return torch.where(inside, x.flip(0), x)


def _mixed_features(model: VisionTransformer, images: Tensor, box: Tensor, grid: tuple[int, int]) -> Tensor:
    """timm's `forward_features` with MixToken between the patch embedding and the position table."""
    x = mix_tokens(model.patch_embed(images), box, grid)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    x = checkpoint_seq(model.blocks, x) if model.grad_checkpointing else model.blocks(x)
    return model.norm(x)


def forward_heads(model: nn.Module, images: Tensor, token_box: Tensor | None = None) -> Heads:
    """Logits of each head of `model` for `images` (B, 3, H, W), in training and in evaluation mode.

    Where `model(images)` merges the heads into one (B, C) tensor, the heads are returned apart.

    Args:
        model: any backbone.
        images: a batch.
        token_box: MixToken (arXiv:2104.10858, section 3.2): tokens in this box (4,) of top, left, bottom, right, in
            cells, are swapped between mirrored samples of the batch before the first block. The token logits are
            swapped back, so that each belongs to its own image; the class token has seen both, in proportion to the
            box.

    Raises:
        ConfigError: MixToken without a dense head.
    """
    if token_box is not None and not isinstance(model, DenseHead):
        raise ConfigError(f"MixToken needs token logits, which {type(model).__name__} lacks: model.dense_head=true.")
    if not isinstance(model, _SEVERAL_HEADS):
        return Heads(cls=model(images))
    # A sharded backbone gathers its weights in methods of its own.
    apart: Any = getattr(model, "several_heads", partial(several_heads, model))
    return apart(images, token_box)


def several_heads(model: Any, images: Tensor, token_box: Tensor | None = None) -> Heads:
    """`forward_heads` of a backbone with more than a class token's head."""
    grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    if token_box is not None:
        features = _mixed_features(model, images, token_box, grid)
    else:
        features = model.forward_features(images)  # (B, prefix + N, D)
    distill = tokens = None
    if isinstance(model, VisionTransformerDistilled):  # the class token first, the distillation token second
        cls = model.head(model.head_drop(features[:, 0]))
        distill = model.head_dist(model.head_drop(features[:, 1]))
    else:
        cls = VisionTransformer.forward_head(model, features)
    if isinstance(model, DenseHead):
        tokens = model.token_logits(features)
        if token_box is not None:
            tokens = mix_tokens(tokens, token_box, grid)
    return Heads(cls=cls, tokens=tokens, distill=distill)
