"""LV-ViT (Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
arXiv:2104.10858): a ViT with a convolutional stem, scaled residual branches, and logits for every token.

Numerically equal to the official code (github.com/zihangJiang/TokenLabeling, commit 9dbfd59); its checkpoints load.
`vit` and `lvvit` are that repository's baselines: the first has plain patches, neither has token logits.

Differences from that code (docs/fidelity.md has the whole table):
- `model(images)` returns one (B, C) tensor in training mode too: class logits + 0.5 max over tokens. `forward_heads`
  returns class and token logits separately, and takes the box of MixToken, which the official model draws inside its
  forward pass.
- `reset_classifier` also resets the classifier of tokens; the official one does not.
- `drop_rate` is timm's (before the classifier); the official one is `pos_drop_rate` and `proj_drop_rate` together.
- Attention-only and MLP-only layers (the official `order=`) are not supported; no published model uses them.

Shapes: B images, C channels or classes, N tokens, H x W pixels.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitrail.models.heads import TokenHead
from vitrail.models.mlp import LeanMlp, normed_mlp
from vitrail.models.registry import build, vit_cfg
from vitrail.models.stem import Stem


class ConvStem(Stem):
    """Stem of three convolutions at half the resolution, with BatchNorm and ReLU, then one of stride patch_size / 2.

    Args:
        img_size, patch_size, kwargs: see `Stem`.
        in_chans: channels of the image.
        embed_dim: width of the tokens.
        width: channels of the first three convolutions.

    Raises:
        ValueError: the patch size is odd.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        width: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, patch_size, **kwargs)
        if any(side % 2 for side in self.patch_size):
            raise ValueError(
                f"patch_size={patch_size}: the convolutional stem halves the image first; choose an even size."
            )
        stride = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, stride, stride=stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of tokens: half the side, rounded up, divided by the stride, rounded down."""
        height, width = ((side + 1) // 2 // (patch // 2) for side, patch in zip(img_size, self.patch_size, strict=True))
        return height, width

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, N, embed_dim)."""
        self.check(images)
        # Channels last is faster on CPU and GPU, and is the layout of the tokens.
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)


class ScaledBlock(Block):
    """Block whose residual branches are divided by `skip_lam`, to limit the growth of features with depth."""

    def __init__(self, *args: Any, skip_lam: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_lam = skip_lam

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map (B, N, C) to the same shape."""
        x = torch.add(x, self.drop_path1(self.attn(self.norm1(x), **mask)), alpha=1 / self.skip_lam)
        return torch.add(x, self.drop_path2(normed_mlp(self.mlp, self.norm2, x)), alpha=1 / self.skip_lam)


class LVViT(VisionTransformer):
    """timm's ViT with LV-ViT's stem and residual scale.

    Args:
        skip_lam: divisor of the residual branches.
        stem_width: channels of the convolutional stem; None uses plain patches.
        kwargs: arguments of timm's VisionTransformer.
    """

    def __init__(self, skip_lam: float = 1.0, stem_width: int | None = 64, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "qkv_bias": False,
            "norm_layer": partial(nn.LayerNorm, eps=1e-5),
            "block_fn": partial(ScaledBlock, skip_lam=skip_lam),
            "mlp_layer": LeanMlp,
        }
        if stem_width is not None:
            defaults["embed_layer"] = partial(ConvStem, width=stem_width)
        super().__init__(**{**defaults, **kwargs})
        self.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise the weights as the official code does: truncated normal of 0.02, also for the class token."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)


class TokenLVViT(TokenHead, LVViT):
    """LV-ViT with a classifier of tokens."""


# ---------------------------------------------------------------------------------------------------- registration

_RELEASES = "https://github.com/zihangJiang/TokenLabeling/releases/download/"


def _cfg(file: str = "", side: int = 224, **kwargs: Any) -> dict[str, Any]:
    return vit_cfg(
        url=_RELEASES + file if file else "",
        input_size=(3, side, side),
        paper_ids="arXiv:2104.10858",
        **{"first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head"), **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.in1k": _cfg("v0.2.0/lvvit_t.pth"),
        "lvvit_s.in1k": _cfg("1.0/lvvit_s-26M-224-83.3.pth.tar"),
        "lvvit_s.in1k_384": _cfg("1.0/lvvit_s-26M-384-84.4.pth.tar", side=384),
        "lvvit_m.in1k": _cfg("1.0/lvvit_m-56M-224-84.0.pth.tar", crop_pct=1.0),
        "lvvit_m.in1k_384": _cfg("1.0/lvvit_m-56M-384-85.4.pth.tar", side=384, crop_pct=1.0),
        "lvvit_m.in1k_448": _cfg("1.0/lvvit_m-56M-448-85.5.pth.tar", side=448, crop_pct=1.0),
        "lvvit_l.untrained": _cfg(crop_pct=1.0),
        "lvvit_l.in1k_448": _cfg("1.0/lvvit_l-150M-448-86.2.pth.tar", side=448, crop_pct=1.0),
        "lvvit_l.in1k_512": _cfg("1.0/lvvit_l-150M-512-86.4.pth.tar", side=512, crop_pct=1.0),
        "lvvit_nano.untrained": _cfg(side=64, num_classes=10, crop_pct=1.0, classifier="head"),
        "lvvit.untrained": _cfg(classifier="head"),
        "vit.untrained": _cfg(classifier="head", first_conv="patch_embed.proj"),
    }
)


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 8.5 M parameters, 2.9 G MACs, 79.1 % top-1."""
    return build(TokenLVViT, "lvvit_t", pretrained, kwargs, mlp_ratio=3, embed_dim=240, depth=12, num_heads=4)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 26.2 M parameters, 6.6 G MACs, 83.3 % top-1; 84.4 % at 384 pixels."""
    return build(
        TokenLVViT, "lvvit_s", pretrained, kwargs, mlp_ratio=3, embed_dim=384, depth=16, num_heads=6, skip_lam=2
    )


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 55.8 M parameters, 84.0 % top-1; 85.4 % at 384 pixels, 85.5 % at 448."""
    return build(
        TokenLVViT, "lvvit_m", pretrained, kwargs, mlp_ratio=3, embed_dim=512, depth=20, num_heads=8, skip_lam=2
    )


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L: 150 M parameters; 86.2 % top-1 at 448 pixels, 86.4 % at 512."""
    config = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3, "stem_width": 128}
    return build(TokenLVViT, "lvvit_l", pretrained, kwargs, mlp_ratio=3, **config)


@register_model
def lvvit_nano(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-nano, for images of 64 pixels: patches of 8, width 64, depth 4, 0.2 M parameters; not from the paper."""
    config = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "stem_width": 16}
    return build(LVViT, "lvvit_nano", pretrained, kwargs, mlp_ratio=3, **config)


@register_model
def lvvit(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S without token logits: 25.8 M parameters."""
    return build(LVViT, "lvvit", pretrained, kwargs, mlp_ratio=3, embed_dim=384, depth=16, num_heads=6, skip_lam=2)


@register_model
def vit(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Baseline of the LV-ViT paper: plain patches, unscaled residuals; 24.4 M parameters."""
    return build(LVViT, "vit", pretrained, kwargs, mlp_ratio=3, embed_dim=384, depth=16, num_heads=6, stem_width=None)
