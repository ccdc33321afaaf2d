"""So-ViT and SoT (Xie et al., arXiv:2104.10935 v1 and v2): a ViT with a convolutional stem and second-order pooling.

A convolution at full resolution, max pooling, and three ResNet bottlenecks (So-ViT) or dense blocks (SoT) embed the
image; class token, fixed sinusoid positions and plain blocks follow. The logits are the sum of those of the class token
and of the pooled patch tokens, see `vitrail.models.second_order`. Numerically equal to the official code
(github.com/jiangtaoxie/So-ViT, commits c2d076e and 5da3c37); its checkpoints load.

Differences from that code (docs/fidelity.md has the whole table):
- Each model has its own configuration. The official builders share one, so a second model in a process fails or loses
  its dropout.
- The stem's strides do not depend on the image size; `patch_size=8` gives the published variant for 112 pixels.
- The position table is a buffer, as in T2T-ViT.
- `drop_rate` is timm's (before the classifier of the class token); the official one is `pos_drop_rate` and
  `proj_drop_rate` together. `pool_drop_rate` is the dropout of the pooled tokens.

Shapes: B images, C channels, H x W pixels, N patch tokens, D channels of a token.
"""

from collections import OrderedDict
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from vitrail.models.mlp import LeanMlp
from vitrail.models.registry import build, vit_cfg
from vitrail.models.second_order import SecondOrderClassifier, so_vit_classifier, sot_classifier
from vitrail.models.sinusoid import SinusoidViT
from vitrail.models.stem import Stem

_WIDTH = 64  # channels of the first convolution


def _bottlenecks(last_stride: int) -> nn.Sequential:
    """Return So-ViT's three bottlenecks of 256 channels, the last of stride 1 or 2."""
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    blocks, width = [], _WIDTH
    for stride in (2, 2, last_stride):
        shortcut = None
        if stride == 2:
            shortcut = nn.Sequential(nn.Conv2d(width, 256, 1, stride, bias=False), nn.BatchNorm2d(256))
        blocks.append(Bottleneck(width, 64, stride, shortcut, norm_layer=norm))
        width = 256
    return nn.Sequential(*blocks)


class DenseLayer(nn.Module):
    """Append 16 channels to the input (DenseNet, Huang et al., arXiv:1608.06993); without BatchNorm, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 32, 1, bias=False)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C + 16, H, W)."""
        return torch.cat((x, self.conv2(F.relu(self.conv1(F.relu(x))))), 1)


def _dense_blocks(last_stride: int) -> nn.Sequential:
    """Return SoT's three dense blocks of six layers, each with a transition to 128 channels and average pooling."""
    stages: list[nn.Module] = []
    width = _WIDTH
    for stride in (2, 2, last_stride):
        layers = [(f"denselayer{i + 1}", DenseLayer(width + 16 * i)) for i in range(6)]
        width += 96
        transition = OrderedDict(norm=nn.BatchNorm2d(width), conv=nn.Conv2d(width, 128, 1, bias=False))
        if stride == 2:
            transition["pool"] = nn.AvgPool2d(2)
        stages += [nn.Sequential(OrderedDict(layers)), nn.Sequential(transition)]
        width = 128
    return nn.Sequential(*stages)


class VisualTokens(Stem):
    """The convolutional stem of both versions.

    Args:
        img_size, patch_size, kwargs: see `Stem`.
        in_chans: channels of the image.
        embed_dim: width of the tokens.
        design: "resnet" (So-ViT) or "densenet" (SoT).

    Raises:
        ValueError: an unknown `design`, or a patch size other than 16 and 8.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        design: Literal["resnet", "densenet"] = "resnet",
        **kwargs: Any,
    ) -> None:
        if to_2tuple(patch_size) not in ((16, 16), (8, 8)):
            raise ValueError(f"patch_size={patch_size}: the stem of So-ViT supports 16 and 8.")
        if design not in ("resnet", "densenet"):
            raise ValueError(f"stem={design}: choose resnet or densenet.")
        self.rounds_up = design == "resnet"  # strided convolutions round up, average pooling rounds down
        super().__init__(img_size, patch_size, **kwargs)
        last_stride = self.patch_size[0] // 8
        stem = nn.Sequential(nn.Conv2d(in_chans, _WIDTH, 3, padding=1), nn.MaxPool2d(3, 2, padding=1))
        stage, width = (_bottlenecks, 256) if design == "resnet" else (_dense_blocks, 128)
        self.tokens = nn.Sequential(
            OrderedDict(stem=stem, stage=stage(last_stride), transition=nn.Conv2d(width, embed_dim, 1))
        )

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of tokens for an image of (height, width) pixels."""
        stride = self.patch_size[0] // 2
        halves = ((side + 1) // 2 for side in img_size)
        rows, columns = ((side + stride - 1) // stride if self.rounds_up else side // stride for side in halves)
        return rows, columns

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, N, embed_dim)."""
        self.check(images)
        # Channels last is faster (1.5 times on a CPU), but there BatchNorm's gradients have 25 times larger errors.
        precise = self.training and images.device.type == "cpu"
        layout = torch.contiguous_format if precise else torch.channels_last
        x = self.tokens(images.contiguous(memory_format=layout))
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)


class SoViT(SinusoidViT):
    """timm's ViT with a convolutional stem and a second-order classifier.

    Args:
        stem: "resnet" (So-ViT) or "densenet" (SoT).
        pool_dims: channels K and L of So-ViT's projections; None uses SoT's pooling.
        pool_heads, pool_width: heads, and channels of each, in SoT's pooling.
        pool_center: see `MultiHeadCovariance`.
        pool_drop_rate: dropout of the pooled tokens.
        kwargs: arguments of timm's VisionTransformer.
    """

    stem_name = "visual_tokens"
    classifier: SecondOrderClassifier

    def __init__(
        self,
        stem: Literal["resnet", "densenet"] = "resnet",
        pool_dims: tuple[int, int] | None = None,
        pool_heads: int = 6,
        pool_width: int = 24,
        pool_center: Literal["head", "channel"] = "head",
        pool_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if pool_dims is not None:
            rows, columns = pool_dims
            self.build_classifier = partial(so_vit_classifier, rows=rows, columns=columns, drop=pool_drop_rate)
        else:
            self.build_classifier = partial(
                sot_classifier, heads=pool_heads, width=pool_width, center=pool_center, drop=pool_drop_rate
            )
        defaults = {
            "qkv_bias": False,
            "norm_layer": partial(nn.LayerNorm, eps=1e-5),
            "mlp_layer": LeanMlp,
            "embed_layer": partial(VisualTokens, design=stem),
        }
        super().__init__(**{**defaults, **kwargs})

    def extend(self) -> None:
        """Replace timm's classifier of the class token by the second-order classifier."""
        norm = self._modules.pop("norm")
        self.head = nn.Identity()
        self.classifier = self.build_classifier(self.embed_dim, self.num_classes)
        self.add_module("norm", norm)  # after the classifier, as in the published checkpoints

    def no_weight_decay(self) -> set[str]:
        """Return an empty set: in the official training the class token is decayed, too."""
        return set()

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the classifiers of the class token and of the pooled patch tokens."""
        return self.classifier.cls_fc, self.classifier.visual_fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers by newly initialised ones for another number of classes."""
        super().reset_classifier(0, global_pool)
        self.num_classes = num_classes
        self.classifier.reset(num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits from features (B, 1 + N, D), or the class token (B, D) with `pre_logits` or without classes."""
        features = super().forward_head(x, pre_logits=True)  # (B, D)
        if pre_logits or self.num_classes == 0:
            return features
        return self.classifier(x[:, self.num_prefix_tokens :], features)


# ---------------------------------------------------------------------------------------------------- registration

_RELEASES = "https://jiangtaoxie.oss-cn-beijing.aliyuncs.com/So-ViT/So-ViT-"


def _cfg(url: str = "") -> dict[str, Any]:
    return vit_cfg(
        crop_pct=0.875,
        url=url,
        first_conv="visual_tokens.tokens.stem.0",
        classifier=("classifier.cls_fc", "classifier.visual_fc"),
        license="unknown",
        paper_ids="arXiv:2104.10935",
    )


_released = {f"so_vit_{depth}.in1k": _cfg(f"{_RELEASES}{depth}.pth.tar") for depth in (7, 10, 14, 19)}
_untrained = {f"sot_{size}.untrained": _cfg() for size in ("tiny", "small", "base")}
default_cfgs = generate_default_cfgs({**_released, **_untrained})


@register_model
def so_vit_7(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """So-ViT-7: 5.6 M parameters, 1.4 G MACs, 76.2 % top-1 in the paper, 76.8 % of the released weights."""
    config = {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2, "pool_dims": (48, 24)}
    return build(SoViT, "so_vit_7", pretrained, kwargs, **config)


@register_model
def so_vit_10(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """So-ViT-10: 7.2 M parameters, 1.8 G MACs, 77.9 % top-1 in the paper, 78.7 % of the released weights."""
    config = {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2, "pool_dims": (48, 24)}
    return build(SoViT, "so_vit_10", pretrained, kwargs, **config)


@register_model
def so_vit_14(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """So-ViT-14: 24.7 M parameters, 5.1 G MACs, 81.8 % top-1 in the paper, 82.3 % of the released weights."""
    config = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3, "pool_dims": (64, 48)}
    return build(SoViT, "so_vit_14", pretrained, kwargs, pool_drop_rate=0.5, **config)


@register_model
def so_vit_19(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """So-ViT-19: 43.9 M parameters, 8.8 G MACs, 82.4 % top-1 in the paper, 82.8 % of the released weights."""
    config = {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3, "pool_dims": (96, 48)}
    return build(SoViT, "so_vit_19", pretrained, kwargs, pool_drop_rate=0.5, **config)


@register_model
def sot_tiny(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """SoT-Tiny: 8.0 M parameters, 2.8 G MACs, 80.3 % top-1."""
    config = {"embed_dim": 240, "depth": 12, "num_heads": 4, "mlp_ratio": 2.5, "pool_width": 14}
    return build(SoViT, "sot_tiny", pretrained, kwargs, stem="densenet", **config)


@register_model
def sot_small(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """SoT-Small: 27.1 M parameters, 6.2 G MACs, 82.7 % top-1."""
    config = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.5, "pool_width": 24, "pool_drop_rate": 0.5}
    return build(SoViT, "sot_small", pretrained, kwargs, stem="densenet", **config)


@register_model
def sot_base(pretrained: bool = False, **kwargs: Any) -> SoViT:
    """SoT-Base: 76.9 M parameters, 15.5 G MACs, 83.5 % top-1."""
    config = {"embed_dim": 528, "depth": 24, "num_heads": 8, "mlp_ratio": 3, "pool_width": 38, "pool_drop_rate": 0.7}
    return build(SoViT, "sot_base", pretrained, kwargs, stem="densenet", **config)
