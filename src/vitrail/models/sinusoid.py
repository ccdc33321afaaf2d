"""Base class of ViTs with a fixed sinusoid position table: T2T-ViT and So-ViT.

The table of Vaswani et al. (arXiv:1706.03762) has a row for the class token first. It is a frozen parameter in the
official code and a buffer here: in checkpoints as published, but not in `parameters()` and so not in the optimiser.

Shapes: N tokens, D channels.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def sinusoid_table(positions: int, dim: int) -> Tensor:
    """Return the position table (1, positions, dim) of arXiv:1706.03762: sine in even columns, cosine in odd ones."""
    frequencies = 10000 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


class SinusoidViT(VisionTransformer):
    """timm's ViT with a fixed position table, and with its stem under the name of the published checkpoints.

    Args:
        weight_init: see timm's VisionTransformer.
        kwargs: arguments of timm's VisionTransformer.
    """

    pos_embed: Tensor
    stem_name: str

    def __init__(self, weight_init: str = "", **kwargs: Any) -> None:
        super().__init__(weight_init="skip", **kwargs)
        table = self.pos_embed.data
        del self.pos_embed  # in timm it is a parameter
        self.register_buffer("pos_embed", table)
        self.extend()
        self.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def extend(self) -> None:
        """Add the layers that timm's ViT does not have, before the weights are initialised."""

    # timm names the stem `patch_embed`, the published checkpoints name it otherwise.
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.stem_name if name == "patch_embed" else name, value)

    @property
    def patch_embed(self) -> Any:
        """The stem, under timm's name."""
        return getattr(self, self.stem_name)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise weights as the official code does: truncated normal of 0.02 for linear layers and class token."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(sinusoid_table(*self.pos_embed.shape[1:]))

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Resize the position table to another image size with timm's kernel, and keep it a buffer."""
        super().set_input_size(img_size, patch_size)
        table = self.pos_embed.data
        del self.pos_embed
        self.register_buffer("pos_embed", table)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's pattern of layers, with the stem under its own name."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": rf"^cls_token|pos_embed|{self.stem_name}"}
