"""Stages of Evo-LeViT (Xu et al., arXiv:2108.01390): timm's LeViT with a class token, scores, slow and fast update.

Shapes: B images, N patch tokens, T = 1 + N, K kept patch tokens, S selections, D channels, H heads, V channels of a
head's values, A attentions.
"""

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from timm.models.levit import Attention, AttentionDownsample, LevitBlock, LevitDownsample, LevitStage
from torch import Tensor, nn

from vitrail.models.token_selection import (
    best_positions,
    gather_tokens,
    keep_mask,
    kept_count,
    merge_left_out,
    restore_tokens,
)


def _heads(x: Tensor, num_heads: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Split projections (B, T, H * sum(sizes)) into one (B, H, T, size) for each size."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2).split(list(sizes), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (B, T, H * V), and the first token's attention to the others (B, N), mean over heads."""
    weights = (q @ k.transpose(-2, -1)).softmax(-1)  # (B, H, T, 1 + N)
    attention = weights[:, :, 0, 1:].mean(1)
    return (weights @ v).transpose(1, 2).flatten(2), _at_least_float32(attention)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _updated(scores: Tensor | None, attention: Tensor, weight: Tensor) -> Tensor:
    """Return the scores (B, N) after an attention (B, N) that has the given weight (1,) in them."""
    return attention if scores is None else (1 - weight) * scores + weight * attention


class ScoringAttention(nn.Module):
    """LeViT's attention without biases; it also returns the class token's attention to the other tokens."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.sizes = (attention.key_dim, attention.key_dim, attention.val_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 1 + N, D) to the same shape, and return the attention (B, N), mean over heads."""
        q, k, v = _heads(self.qkv(x), self.num_heads, self.sizes)
        out, attention = _attend(q * self.scale, k, v)
        return self.proj(out), attention


class ScoringBlock(nn.Module):
    """LeViT's block that also returns the class token's attention to the other tokens."""

    def __init__(self, block: LevitBlock) -> None:
        super().__init__()
        self.attn, self.mlp = ScoringAttention(block.attn), block.mlp
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 1 + N, D) to the same shape, and return the attention (B, N), mean over heads."""
        out, attention = self.attn(x)
        x = x + self.drop_path1(out)
        return x + self.drop_path2(self.mlp(x)), attention


class ScoringAttentionDownsample(nn.Module):
    """LeViT's attention from every second row and column, with positions in place of biases, and the class token."""

    def __init__(self, attention: AttentionDownsample) -> None:
        super().__init__()
        self.kv, self.q, self.proj = attention.kv, attention.q, attention.proj
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.sizes = (attention.key_dim, attention.val_dim)
        (rows, columns), weight = attention.resolution, attention.kv.linear.weight
        self.pos_embed = nn.Parameter(weight.new_zeros(1, 1 + rows * columns, weight.shape[1]))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 1 + N, D) to a quarter of the patch tokens, and return the attention to them, mean over heads."""
        x = x + self.pos_embed
        k, v = _heads(self.kv(x), self.num_heads, self.sizes)
        coarse = torch.cat((x[:, :1], self.q.down(x[:, 1:])), 1)
        (q,) = _heads(self.q.ln(coarse), self.num_heads, self.sizes[:1])
        out, attention = _attend(q * self.scale, k, v)
        return self.proj(out), self.subsample(attention)

    def subsample(self, scores: Tensor) -> Tensor:
        """Return the scores (B, N) of every second row and column."""
        return self.q.down(scores[..., None])[..., 0]


class ScoringDownsample(nn.Module):
    """LeViT's downsampling, which updates the scores too."""

    def __init__(self, downsample: LevitDownsample) -> None:
        super().__init__()
        self.attn_downsample = ScoringAttentionDownsample(downsample.attn_downsample)
        self.mlp, self.drop_path = downsample.mlp, downsample.drop_path

    def forward(self, x: Tensor, scores: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, 1 + N, D) and scores (B, N) to a quarter of them; the sum of the scores stays the same."""
        x, attention = self.attn_downsample(x)
        coarse = _updated(self.attn_downsample.subsample(scores), attention, weight)
        scores = coarse * (scores.sum(1, keepdim=True) / coarse.sum(1, keepdim=True))
        return x + self.drop_path(self.mlp(x)), scores


class SlowFastStage(nn.Module):
    """LeViT's stage with slow and fast update.

    Args:
        stage: timm's stage, whose layers it takes.
        keep_ratios: share of the patch tokens that each block computes.
    """

    def __init__(self, stage: LevitStage, keep_ratios: Sequence[float]) -> None:
        super().__init__()
        coarser = hasattr(stage.downsample, "attn_downsample")
        self.downsample = ScoringDownsample(stage.downsample) if coarser else None
        self.grid: tuple[int, int] = tuple(stage.blocks[0].attn.resolution)
        self.blocks = nn.ModuleList(ScoringBlock(block) for block in stage.blocks)
        self.keep_ratios = tuple(keep_ratios)

    @property
    def num_attentions(self) -> int:
        """Number of attentions, that of the downsampling included."""
        return len(self.blocks) + (self.downsample is not None)

    def forward(
        self, x: Tensor, scores: Tensor | None, weights: Tensor, stage_wise: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Run the stage.

        Args:
            x: (B, 1 + N, D), in image order.
            scores: (B, N); None before the first attention.
            weights: (A, 1), weight of each attention in the scores.
            stage_wise: select once rather than before every block.

        Returns:
            Tokens and scores of this stage's grid, and decisions (B, S, N), 1 for kept tokens.
        """
        scores = None if scores is None else _at_least_float32(scores)
        if self.downsample is not None:
            assert scores is not None
            x, scores = self.downsample(x, scores, weights[0])
            weights = weights[1:]
        decisions = []
        for first, end in self._groups(stage_wise):
            count = kept_count(x.shape[1] - 1, self.keep_ratios[first])
            blocks = list(zip(self.blocks[first:end], weights[first:end], strict=True))
            if count == x.shape[1] - 1:
                for block, weight in blocks:
                    x, attention = block(x)
                    scores = _updated(scores, attention, weight)
                continue
            assert scores is not None
            chosen = best_positions(scores, count)
            decisions.append(keep_mask(chosen, x.shape[1] - 1))
            x, scores = _slow_fast(x, scores, chosen, blocks)
        return x, scores, torch.stack(decisions, 1) if decisions else x.new_zeros(len(x), 0, x.shape[1] - 1)

    def _groups(self, stage_wise: bool) -> list[tuple[int, int]]:
        """Return the first and end of each run of blocks that one selection serves."""
        depth = len(self.blocks)
        start = next((number for number, ratio in enumerate(self.keep_ratios) if ratio < 1), depth)
        single = start if stage_wise else depth
        return [(number, number + 1) for number in range(single)] + ([(start, depth)] if single < depth else [])


def _slow_fast(
    x: Tensor, scores: Tensor, chosen: Tensor, blocks: Sequence[tuple[nn.Module, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Run blocks, each with its weight in the scores, on the tokens at positions (B, K) and a representative token.

    Returns:
        All tokens (B, 1 + N, D) and scores (B, N).
    """
    representative = merge_left_out(x, scores, chosen, prefix=1)
    kept, kept_scores = torch.cat((gather_tokens(x, chosen, 1), representative), 1), scores.gather(1, chosen)
    for block, weight in blocks:
        kept, attention = block(kept)
        kept_scores = _updated(kept_scores, attention[:, :-1], weight)
    x = x + (kept[:, -1:] - representative)  # what the blocks added to the representative token
    return restore_tokens(x, kept[:, :-1], chosen, prefix=1), scores.scatter(1, chosen, kept_scores)
