"""Where a ViT's class token looks: attention of the last block, and attention rollout.

Rollout follows Abnar and Zuidema (Quantifying Attention Flow in Transformers, arXiv:2005.00928): attention averaged
over heads, half of it replaced by the identity for the residual connection, multiplied over all blocks.

Where a network selects tokens (DynamicViT, Evo-ViT), a token that is left out attends to itself only. Where a class
token joins the patch tokens after their blocks (VOLO), tokens that a block does not update attend to themselves.

Shapes: B images, P prefix tokens, N patch tokens, T = P + N, H heads, Q queries (T, or 1 where a last block computes
only the class token), K kept tokens with the prefix, S selections.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import ConfigError
from vitrail.models.heads import forward_heads, token_grid


@torch.no_grad()
def attention_weights(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the attention (B, Q, T) of each block over all patch tokens, averaged over heads, in float32.

    The forward pass runs in evaluation mode. Attention within windows or among other tokens is left out.

    Args:
        model: ViT of timm or vitrail.
        images: images (B, 3, H, W).

    Raises:
        ConfigError: the last attention of the backbone is not over all its patch tokens.
    """
    refusal = f"{type(model).__name__} has no attention over all its patch tokens."
    try:
        rows, columns = token_grid(model, (images.shape[-2], images.shape[-1]))
    except ConfigError as error:
        raise ConfigError(refusal) from error
    tokens = rows * columns + getattr(model, "num_prefix_tokens", 0)
    training = model.training
    model.eval()
    try:
        with _AttentionRecorder() as recorder, _class_attention(model) as last:
            outputs = forward_heads(model, images)
    finally:
        model.train(training)
    starts: Any = getattr(model, "selection_blocks", None)
    if starts is not None:
        blocks: Any = model.blocks
        own = recorder.weights[-len(blocks) :]
        return _of_all_tokens(own, outputs.extras["decisions"].bool(), starts, tokens - rows * columns)
    if last:
        return _with_class_token([weights for weights in recorder.weights if weights.shape[2] == tokens], last)
    if not recorder.weights or recorder.weights[-1].shape[::2] != (len(images), tokens):
        raise ConfigError(refusal)
    return [weights for weights in recorder.weights if weights.shape[2] == tokens]


def _of_all_tokens(weights: Sequence[Tensor], kept: Tensor, starts: Sequence[int], prefix: int) -> list[Tensor]:
    """Return the attention (B, T, T) of each block over all tokens.

    Args:
        weights: attention (B, K, K) of each block, whose kept tokens are in image order.
        kept: patch tokens (B, S, N) that each selection keeps.
        starts: blocks before which tokens are selected.
        prefix: prefix tokens, P, which are always kept.
    """
    everything: list[Tensor] = []
    for block, attention in enumerate(weights):
        selection = sum(start <= block for start in starts) - 1
        if selection < 0:
            everything.append(attention)
            continue
        chosen = F.pad(kept[:, selection], (prefix, 0), value=True)  # (B, T)
        itself = torch.eye(chosen.shape[1], device=attention.device).repeat(len(chosen), 1, 1)
        everything.append(itself.masked_scatter(chosen[:, :, None] & chosen[:, None], attention))
    return everything


@contextmanager
def _class_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the attention (B, 1, 1 + N) of each block in which only a class token attends (VOLO)."""
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].float().mean(1))

    blocks: Any = getattr(model, "post_network", None) or ()
    handles = [block.attn.attn_drop.register_forward_pre_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _with_class_token(blocks: Sequence[Tensor], last: Sequence[Tensor]) -> list[Tensor]:
    """Return the attention (B, T, T) of blocks of patch tokens (B, N, N), and of a class token after them (B, 1, T)."""
    count, _, tokens = last[0].shape
    itself = torch.eye(tokens, device=last[0].device).repeat(count, 1, 1)
    everything = [itself.clone() for _ in range(len(blocks) + len(last))]
    for whole, attention in zip(everything, blocks, strict=False):
        whole[:, 1:, 1:] = attention
    for whole, row in zip(everything[len(blocks) :], last, strict=True):
        whole[:, :1] = row
    return everything


def class_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class token's attention to the patches in the last block, (B, rows, columns); each map sums to 1.

    Without a class token, it is the mean attention of all tokens.

    Raises:
        ConfigError: the last attention of the backbone is not over all its patch tokens.
    """
    return maps_of(attention_weights(model, images)[-1], model, images)


def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Return the rollout of attention from the class token to the patches, (B, rows, columns); each map sums to 1.

    Without a class token, it is the mean over all tokens.

    Raises:
        ConfigError: the last attention of the backbone is not over all its patch tokens.
    """
    return maps_of(rollout(attention_weights(model, images)), model, images)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Return the product (B, Q, T) of the attention (B, Q, T) of all blocks, each with its residual connection."""
    flow: Tensor | None = None
    for attention in weights:
        queries, tokens = attention.shape[1:]
        mixed = (attention + torch.eye(queries, tokens, device=attention.device)) / 2
        flow = mixed if flow is None else mixed @ flow
    assert flow is not None
    return flow / flow.sum(-1, keepdim=True)


def maps_of(flow: Tensor, model: nn.Module, images: Tensor) -> Tensor:
    """Return the patches' part of flow (B, Q, T) from the class token as maps (B, rows, columns) that sum to 1."""
    grid = token_grid(model, (images.shape[-2], images.shape[-1]))
    prefix = flow.shape[2] - grid[0] * grid[1]
    uses_class_token = prefix > 0 and getattr(model, "global_pool", "token") == "token"
    row = flow[:, 0] if uses_class_token else flow.mean(1)
    patches = row[:, prefix:]
    return (patches / patches.sum(1, keepdim=True)).unflatten(1, grid)


class _AttentionRecorder(TorchFunctionMode):
    """Record the weights of each call of scaled_dot_product_attention, which does not return them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        if func is F.scaled_dot_product_attention and given["query"].ndim == 4:
            self.weights.append(_weights(given["query"], given["key"], given.get("attn_mask"), given.get("scale")))
        return func(*args, **(kwargs or {}))


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return softmax(q k^T) of q (B, H, Q, D) and k (B, H, T, D) as (B, Q, T), averaged over heads."""
    scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, Q, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).mean(1)
