"""Pyramids: from four feature maps of a ViT, all at one resolution, to maps at several.

Attributes have the names of the published code, so that its checkpoints load.

Shapes: B images, D channels of the backbone, h x w positions of its maps.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.models.segmentation.decoders import ConvModule

LAST_WIDTH = 2048
"""Channels of the last map of LV-ViT's pyramid."""


class LVViTPyramid(nn.Module):
    """Pyramid of LV-ViT (arXiv:2104.10858; github.com/zihangJiang/TokenLabeling, `seg/`): 1/4, 1/8, 1/16 and 1/16.

    The last map stays at 1/16 of the image and is widened to 2048 channels.

    Args:
        widths: channels of the four maps.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.side_layer1 = nn.Sequential(*_unit(_up(first, 4), first), *_unit(_point(first, first), first))
        self.side_layer2 = nn.Sequential(*_unit(_up(second, 2), second), *_unit(_point(second, second), second))
        self.side_layer3 = nn.Sequential(*_unit(_point(third, third), third))
        self.side_layer4 = nn.Sequential(*_unit(_point(fourth, LAST_WIDTH), LAST_WIDTH))
        self.widths = (first, second, third, LAST_WIDTH)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map four (B, D, h, w) to (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w) and (B, 2048, h, w)."""
        layers = (self.side_layer1, self.side_layer2, self.side_layer3, self.side_layer4)
        return [layer(features) for layer, features in zip(layers, maps, strict=True)]


def _up(width: int, factor: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, factor, stride=factor, bias=False)


def _point(width: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 1, bias=False)


def _unit(layer: nn.Module, width: int) -> tuple[nn.Module, ...]:
    return layer, nn.BatchNorm2d(width), nn.ReLU(inplace=True)


class BEiTPyramid(nn.Module):
    """Pyramid of BEiT (arXiv:2106.08254), which MAE uses too: 1/4, 1/8, 1/16 and 1/32 by transposed convolutions.

    The attributes are those of mmsegmentation's Feature2Pyramid.

    Args:
        widths: channels of the four maps.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, *_ = widths
        self.upsample_4x = nn.Sequential(
            nn.ConvTranspose2d(first, first, 2, stride=2),
            nn.BatchNorm2d(first),
            nn.GELU(),
            nn.ConvTranspose2d(first, first, 2, stride=2),
        )
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(second, second, 2, stride=2))
        self.widths = tuple(widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map four (B, D, h, w) to (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w) and (B, D, h / 2, w / 2)."""
        return [self.upsample_4x(maps[0]), self.upsample_2x(maps[1]), maps[2], F.max_pool2d(maps[3], 2, 2)]


class MultiLevelNeck(nn.Module):
    """mmsegmentation's neck for ViT and DeiT: a 1x1 convolution, a bilinear resize by 4, 2, 1 and 1/2, a 3x3 one.

    Args:
        widths: channels of the four maps.
        scales: factor of each map's resolution.
    """

    def __init__(self, widths: Sequence[int], scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        self.scales, width = tuple(scales), widths[0]
        self.lateral_convs = nn.ModuleList(ConvModule(own, width, 1, plain=True) for own in widths)
        self.convs = nn.ModuleList(ConvModule(width, width, 3, plain=True) for _ in widths)
        self.widths = (width,) * len(widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map four (B, D, h, w) to (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w) and (B, D, h / 2, w / 2)."""
        return [
            conv(F.interpolate(lateral(features), scale_factor=scale, mode="bilinear", align_corners=False))
            for lateral, conv, scale, features in zip(self.lateral_convs, self.convs, self.scales, maps, strict=True)
        ]


class NoPyramid(nn.Module):
    """No pyramid: the maps stay as they are, as for a backbone that has several resolutions itself.

    Args:
        widths: channels of the maps.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps."""
        return list(maps)


PYRAMIDS = {"lvvit": LVViTPyramid, "beit": BEiTPyramid, "mln": MultiLevelNeck, "none": NoPyramid}
