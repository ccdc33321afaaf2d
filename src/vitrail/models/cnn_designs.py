"""Layers for the CNN designs that the T2T-ViT paper studies (arXiv:2101.11986, section 3.2).

Squeeze-and-excitation, ghost features and dense connections. ResNeXt's cardinality and Wide ResNet's width need no
extra layers.

Shapes: B images, N tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, use_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al., arXiv:1709.01507): scale channels by a function of their mean over tokens."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        narrow = dim // reduction
        layers = nn.Linear(dim, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, dim, bias=False), nn.Sigmoid()
        self.fc = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        return x * self.fc(x.mean(1)).unsqueeze(1)


class SqueezeExciteAttention(Attention):
    """Attention with squeeze-and-excitation after the projection, followed by dropout."""

    def __init__(self, dim: int, proj_drop: float = 0.0, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.se_layer = SqueezeExcite(dim)
        self.se_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map (B, N, C) to the same shape."""
        return self.se_drop(self.se_layer(super().forward(x, **mask)))


def _cheap(dim: int) -> nn.Conv1d:
    """Return the layer that makes ghost features: one weight per channel."""
    return nn.Conv1d(dim, dim, kernel_size=1, groups=dim, bias=False)


class GhostAttention(nn.Module):
    """Attention that computes half of q, k and v and derives the rest cheaply (GhostNet, Han et al., arXiv:1911.11907).

    Raises:
        ValueError: `qk_norm` or `scale_norm` is set; the published design has neither.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, **others: Any
    ) -> None:
        super().__init__()
        if others.pop("qk_norm", False) or others.pop("scale_norm", False):
            raise ValueError("qk_norm, scale_attn_norm: ghost attention has no norms; set both to false.")
        half = dim // 2
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, half, bias=qkv_bias) for _ in range(3))
        self.cheap_operation_q, self.cheap_operation_k, self.cheap_operation_v = (_cheap(half) for _ in range(3))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.fused_attn = use_fused_attn()

    def _heads(self, x: Tensor, linear: nn.Linear, cheap: nn.Conv1d) -> Tensor:
        """Map (B, N, C) to (B, heads, N, C / heads)."""
        half = linear(x)
        full = torch.cat((half, cheap(half.mT).mT), dim=2)
        return full.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        q = self._heads(x, self.q, self.cheap_operation_q)
        k = self._heads(x, self.k, self.cheap_operation_k)
        v = self._heads(x, self.v, self.cheap_operation_v)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop(((q @ k.mT) * self.scale).softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class GhostMlp(nn.Module):
    """MLP of ratio 3 that computes a third of its hidden layer and derives the rest cheaply from it.

    Raises:
        ValueError: the ratio is not 3.
    """

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: type[nn.Module], drop: float, **others: Any
    ) -> None:
        super().__init__()
        if hidden_features != 3 * in_features:
            raise ValueError(
                f"mlp_ratio={hidden_features / in_features:g}: the ghost MLP needs a ratio of 3; set mlp_ratio=3."
            )
        self.fc1 = nn.Linear(in_features, in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)
        self.cheap_operation2, self.cheap_operation3 = _cheap(in_features), _cheap(in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        x = self.act(self.fc1(x))
        copies = (self.act(cheap(x.mT).mT) for cheap in (self.cheap_operation2, self.cheap_operation3))
        return self.drop(self.fc2(self.drop(torch.cat((x, *copies), dim=2))))


class GhostBlock(Block):
    """timm's block without attention masks, which ghost attention does not support."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Map (B, N, C) to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class DenseBlock(Block):
    """Block that appends `growth` features to its input (DenseNet, Huang et al., arXiv:1608.06993)."""

    def __init__(self, dim: int, growth: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.dense_linear = nn.Linear(dim, growth)

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map (B, N, C) to (B, N, C + growth)."""
        return torch.cat((x, self.dense_linear(super().forward(x, **mask))), dim=2)


class Transition(nn.Module):
    """Layer that halves the width between two stages of the dense variant."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.linear = nn.Linear(dim, dim // 2)

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map (B, N, C) to (B, N, C / 2)."""
        return self.act(self.linear(x))
