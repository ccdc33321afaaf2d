"""Decoders of semantic segmentation: UperNet, the FCN head and a linear head, in mmsegmentation's layout of names.

UperNet: Xiao et al., arXiv:1807.10221. All resizes are bilinear with `align_corners=False`.

Shapes: B images, C classes, D channels, h x w positions of the first map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_map(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize features or logits (B, D, h, w) bilinearly to (height, width)."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, tuple(size), mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    """Convolution without bias, BatchNorm and ReLU; `plain`: a convolution with bias alone.

    Args:
        width: channels of the input.
        out: channels of the output.
        kernel: side of the kernel, 1 or 3; the padding keeps the resolution.
        plain: omit norm and activation.
    """

    def __init__(self, width: int, out: int, kernel: int, plain: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=plain)
        self.bn = nn.Identity() if plain else nn.BatchNorm2d(out)
        self.plain = plain
        if not plain:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, out, h, w)."""
        x = self.conv(x)
        return x if self.plain else F.relu(self.bn(x), inplace=True)


def _classifier(width: int, num_classes: int) -> nn.Conv2d:
    head = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    return head


class UPerHead(nn.Module):
    """UperNet's decoder: pooled context on the last map, top-down sums, fusion of all maps at the first resolution.

    Args:
        widths: channels of the maps, from the finest to the coarsest.
        channels: width of the decoder.
        num_classes: number of classes, C.
        pool_scales: sides of the pooled context.
        dropout: dropout of whole channels before the classifier.
    """

    def __init__(
        self,
        widths: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv_seg = _classifier(channels, num_classes)
        self.dropout = nn.Dropout2d(dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(widths[-1], channels, 1)) for side in pool_scales
        )
        self.bottleneck = ConvModule(widths[-1] + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvModule(len(widths) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map features (B, D, h, w), ... to logits (B, C, h, w)."""
        levels = [lateral(features) for lateral, features in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self._context(maps[-1]))
        for number in range(len(levels) - 1, 0, -1):
            upper = levels[number - 1]
            levels[number - 1] = upper + resize_map(levels[number], upper.shape[-2:])
        outputs = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)] + [levels[-1]]
        size = outputs[0].shape[-2:]
        fused = self.fpn_bottleneck(torch.cat([resize_map(output, size) for output in outputs], 1))
        return self.conv_seg(self.dropout(fused))

    def _context(self, features: Tensor) -> Tensor:
        """Concatenate features (B, D, h, w) with their pooled context, and reduce to (B, channels, h, w)."""
        size = features.shape[-2:]
        pooled = [resize_map(module(features), size) for module in self.psp_modules]
        return self.bottleneck(torch.cat([features, *pooled], 1))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier, the auxiliary head of the published recipes (arXiv:1411.4038).

    Args:
        width: channels of the map.
        channels: width of the convolution.
        num_classes: number of classes, C.
        dropout: dropout of whole channels before the classifier.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv_seg = _classifier(channels, num_classes)
        self.convs = nn.Sequential(ConvModule(width, channels, 3))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D, h, w) to logits (B, C, h, w)."""
        return self.conv_seg(self.dropout(self.convs(features)))


class LinearHead(nn.Module):
    """BatchNorm, dropout and a classifier on the concatenated maps, as DINOv3 probes frozen features (2508.10104).

    Args:
        widths: channels of the maps, which have one resolution.
        num_classes: number of classes, C.
        dropout: dropout of whole channels.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.batchnorm = nn.BatchNorm2d(sum(widths))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = _classifier(sum(widths), num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map features (B, D, h, w), ... to logits (B, C, h, w)."""
        size = maps[0].shape[-2:]
        return self.conv_seg(self.dropout(self.batchnorm(torch.cat([resize_map(part, size) for part in maps], 1))))
