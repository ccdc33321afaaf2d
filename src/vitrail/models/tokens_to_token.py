"""Tokens-to-Token module: the stem of T2T-ViT (Yuan et al., arXiv:2101.11986, section 3.1).

A soft split cuts the map into overlapping windows and concatenates the pixels of each window to one token. A small
transformer or performer layer of width 64 mixes the tokens, which are then reshaped to a map. Splits of 7/4/2, 3/2/1
and 3/2/1 (kernel/stride/padding) turn an image of 224 pixels into 56, 28 and 14 tokens per side.

Details that only the official code gives (github.com/yitu-opensource/T2T-ViT): the residual of a layer comes from v,
because its input has another width; attention is scaled by (input width)^-1/2; the performer projects to k, q, v in
this order, has 32 random features, adds 1e-8 to its denominator, and has a dropout of 0.1.

Shapes: B images, C channels, H x W pixels, N tokens, D width of the input (147 or 576), E = 64 width of the layer,
F = 32 random features.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple, use_fused_attn
from torch import Tensor, nn

from vitrail.models.stem import Stem

_EPS = 1e-5  # of every LayerNorm


def _normed_linear(norm: nn.LayerNorm, linear: nn.Linear, x: Tensor) -> Tensor:
    """Return linear(norm(x)), with the norm's weights folded into the linear layer.

    The result is the same. If x needs no gradient, as for windows of an image, this saves one matrix product: the
    norm's gradients follow from those of the folded weights.
    """
    weight = linear.weight * norm.weight
    bias = linear.weight @ norm.bias if linear.bias is None else torch.addmv(linear.bias, linear.weight, norm.bias)
    return F.linear(F.layer_norm(x, norm.normalized_shape, eps=norm.eps), weight, bias)


class TokenPerformer(nn.Module):
    """Performer layer (Choromanski et al., arXiv:2009.14794): attention linear in the number of tokens.

    The softmax kernel is estimated with positive random features phi(x) = exp(w x - |x|^2 / 2) / sqrt(F). The official
    code computes these exponentials directly: they vanish for large |x|, and overflow or become 0 / 0 in half
    precision. Here the same quotient is written as two softmaxes, over tokens for each feature and over features for
    each token, in float32, which cannot overflow:

        sum_f phi_f(q) sum_s phi_f(k_s) v_s / (sum_f phi_f(q) sum_s phi_f(k_s) + eps)
            = sum_f softmax_f(w_f q + L_f) sum_s softmax_s(w_f k_s - |k_s|^2 / 2) v_s  *  d / (d + eps)

    with L_f = logsumexp_s(w_f k_s - |k_s|^2 / 2) and d the denominator, of which only the logarithm is needed.

    Args:
        dim: width D of the tokens.
        width: width E of the layer.
        drop: dropout after the projection and the MLP; fixed at 0.1 in the official scripts.
        eps: added to the denominator. The published weights were trained with 1e-8, which shrinks the attention's
            output to 0 for long queries and keys; 0 turns it off.
    """

    w: Tensor

    def __init__(self, dim: int, width: int = 64, drop: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_buffer("w", torch.empty(width // 2, width))  # (F, E), fixed
        self.kqv = nn.Linear(dim, 3 * width)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(drop))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the random features: orthogonal rows of length sqrt(F)."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(self.w.shape[0]))

    def attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        """Return the linear attention (B, N, E) of k, q, v (B, N, E) each, in float32."""
        with nullcontext() if k.is_meta else torch.autocast(k.device.type, enabled=False):
            k, q, v, w = k.float(), q.float(), v.float(), self.w.float()
            keys = w @ k.mT - k.square().sum(-1).mul(0.5).unsqueeze(1)  # (B, F, N)
            keys_lse = keys.logsumexp(-1)  # (B, F)
            values = keys.softmax(-1) @ v  # (B, F, E)
            queries = q @ w.mT + keys_lse.unsqueeze(1)  # (B, N, F)
            out = queries.softmax(-1) @ values  # (B, N, E)
            if self.eps:
                log_d = queries.logsumexp(-1) - q.square().sum(-1).mul(0.5) - math.log(w.shape[0])  # (B, N)
                out = out * torch.sigmoid(log_d - math.log(self.eps)).unsqueeze(-1)  # d / (d + eps)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, E)."""
        k, q, v = _normed_linear(self.norm1, self.kqv, tokens).split(self.width, dim=-1)
        x = v + self.dp(self.proj(self.attend(k, q, v).to(v.dtype)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Attention with one head of width E, its queries scaled by D^-1/2, and v as its residual."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Normalise tokens (B, N, D) with `norm` and map them to (B, N, E)."""
        q, k, v = _normed_linear(norm, self.qkv, tokens).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, N, E) each
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            x = ((q * self.scale) @ k.mT).softmax(-1) @ v
        return (v + self.proj(x)).squeeze(1)


class TokenTransformer(nn.Module):
    """Transformer layer whose output (B, N, E) is narrower than its input (B, N, D)."""

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = TokenAttention(dim, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, E)."""
        x = self.attn(tokens, self.norm1)
        return x + self.mlp(self.norm2(x))


class TokensToToken(Stem):
    """The three soft splits with a token layer after each of the first two.

    Args:
        img_size, patch_size, strict_img_size, output_fmt: see `Stem`.
        in_chans: channels of the image.
        embed_dim: width of the output tokens.
        tokens_type: "performer", or "transformer" for the `t2t_vit_t_*` models.
        token_dim: width E of the token layers.
        token_drop: dropout of the performer (0.1 as published); the transformer has none.
        performer_eps: see `TokenPerformer`.

    Raises:
        ValueError: `tokens_type` is unknown, or the patch size is not 16.
    """

    splits = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        tokens_type: str = "performer",
        token_dim: int = 64,
        token_drop: float = 0.1,
        performer_eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        if to_2tuple(patch_size) != (16, 16):
            raise ValueError(f"patch_size={patch_size}: the splits of T2T-ViT fix the patch size; use 16.")
        if tokens_type not in ("performer", "transformer"):
            raise ValueError(f"tokens_type={tokens_type}: choose performer or transformer.")
        super().__init__(img_size, patch_size, **kwargs)
        self.in_chans = in_chans
        self.soft_split0, self.soft_split1, self.soft_split2 = (
            nn.Unfold(kernel, padding=padding, stride=stride) for kernel, stride, padding in self.splits
        )
        self.attention1, self.attention2 = (
            TokenPerformer(dim, token_dim, token_drop, performer_eps)
            if tokens_type == "performer"
            else TokenTransformer(dim, token_dim)
            for dim in (in_chans * 7 * 7, token_dim * 3 * 3)
        )
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of tokens; the padded splits accept any size and round up."""
        return self._grids(img_size)[-1]

    def _grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        grids = []
        for kernel, stride, padding in self.splits:
            size = tuple((side + 2 * padding - kernel) // stride + 1 for side in size)  # type: ignore[assignment]
            grids.append(size)
        return grids

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, N, embed_dim)."""
        self.check(images)
        grid1, grid2, grid3 = self._grids((images.shape[-2], images.shape[-1]))
        x = self.attention1(self.soft_split0(images).mT)
        x = self.attention2(self.soft_split1(x.mT.unflatten(-1, grid1)).mT)
        x = self.project(self.soft_split2(x.mT.unflatten(-1, grid2)).mT)
        return x if self.flatten else x.unflatten(1, grid3)
