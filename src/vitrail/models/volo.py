"""VOLO (Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", arXiv:2106.13112), trained with token labels.

The network is timm's, under timm's names (`volo_d1_224` to `volo_d5_512`). This file adds what a training needs: class
and token logits apart, in training and in evaluation, and MixToken. They are numerically equal to the official code
(github.com/sail-sg/volo, commit cf35775); its checkpoints load, and the position table is resized to the image size.

Differences from the official code (docs/fidelity.md has the whole table):
- `model(images)` returns one (B, C) tensor in training mode too, as in timm: class logits + 0.5 max over tokens.
  `forward_heads` returns both heads, and takes the box of MixToken, which the official model draws inside its forward
  pass.
- timm's `forward_train` is not used: it returns class features instead of logits, and draws other boxes.

Shapes: B images, C classes, N tokens, D channels, H x W pixels, h x w cells of the map of patches (8 pixels each; the
token grid has half as many rows and columns).
"""

from typing import Any

from timm.models.volo import VOLO
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.token_mixing import mix_tokens
from vitrail.types import Outputs


class TokenVOLO(VOLO):
    """timm's VOLO with class and token logits and MixToken; `declare_token_logits` turns timm's models into it."""

    outputs = frozenset({"tokens"})
    mixes_tokens = True

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Return both classifiers, the classifier of tokens last."""
        return self.head, self.aux_head

    @property
    def patch_size(self) -> int:
        """Side in pixels of the patches of the map; a token covers 2 x 2 of them."""
        return int(self.patch_embed.conv[0].stride[0] * self.patch_embed.proj.stride[0])

    def token_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of tokens for images of (height, width) pixels, multiples of the patch size."""
        rows, columns = (side // self.patch_size // self.pooling_scale for side in image_size)
        return rows, columns

    def forward_outputs(self: Any, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return class and token logits for images (B, 3, H, W); see `forward_heads`.

        `token_box` is in cells of the token grid. The map of patches, which is mixed, has twice as many rows and
        columns.
        """
        x = self.patch_embed(images).permute(0, 2, 3, 1)  # (B, h, w, D)
        rows, columns, scale = x.shape[1], x.shape[2], self.pooling_scale
        if token_box is not None:
            x = mix_tokens(x, token_box * scale, (rows, columns))
        x = self.norm(self.forward_cls(self.forward_tokens(x)))  # (B, 1 + N, D)
        cls = self.head(self.head_drop(x[:, 0]))
        if self.aux_head is None:  # without classes
            return Outputs(cls)
        tokens = self.aux_head(self.head_drop(x[:, 1:]))
        if token_box is not None:
            tokens = mix_tokens(tokens, token_box, (rows // scale, columns // scale))
        return Outputs(cls, tokens)


def has_token_logits(model: nn.Module) -> bool:
    """Return whether `model` is a VOLO with a class token and a classifier of tokens."""
    volo: Any = model
    return (
        isinstance(model, VOLO)
        and isinstance(volo.aux_head, nn.Linear)
        and volo.global_pool == "token"
        and volo.post_network is not None
    )


def declare_token_logits(model: nn.Module) -> nn.Module:
    """Make timm's VOLO a `TokenVOLO`, in place, if it has token logits; return other models unchanged.

    Raises:
        ConfigError: it is to mix patches itself.
    """
    volo: Any = model
    if type(model) is VOLO and has_token_logits(model):
        if volo.mix_token:
            raise ConfigError("model.use_mix_token=true: has no effect in timm's networks; use mixing=mixtoken.")
        volo.__class__ = TokenVOLO
    return model
