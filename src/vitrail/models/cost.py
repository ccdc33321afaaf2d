"""Cost of a backbone: parameters, multiply-accumulates, tokens, memory of activations."""

from typing import NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, UntypedStorage, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.models.heads import forward_heads


class Cost(NamedTuple):
    """Size of a backbone and the compute of its forward pass for one image."""

    parameters: int
    """Weights in the checkpoint: trained parameters and fixed tables, without running statistics."""
    macs: int
    """Multiply-accumulates of matrix products, convolutions and attention, without norms and activations."""
    tokens: int | None
    """Tokens per block, class token included; None for backbones without tokens."""


def count_parameters(model: nn.Module) -> int:
    """Count parameters as the official scripts do: with frozen tables, without BatchNorm's statistics."""
    fixed = [model.get_buffer(name) for name in _fixed_tables(model)]
    return sum(tensor.numel() for tensor in (*model.parameters(), *fixed))


def _fixed_tables(model: nn.Module) -> list[str]:
    """Return the names of T2T-ViT's fixed tables: frozen parameters in the official code, buffers here."""
    return [name for name, _ in model.named_buffers() if name == "pos_embed" or name.endswith(".w")]


@torch.no_grad()
def measure_cost(model: nn.Module, img_size: tuple[int, int], in_chans: int = 3) -> Cost:
    """Measure the cost of `model` for one image of (height, width) pixels, without computing anything.

    The forward pass runs in evaluation mode on tensors without data, so a backbone of any size takes well under a
    second and no memory. A wrong image size raises the error of the model's forward pass.
    """
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    training = model.training
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, shapes, (torch.empty(1, in_chans, *img_size, device="meta"),))
    finally:
        model.train(training)
    tokens = None
    if isinstance(model, VisionTransformer | Eva):  # timm's or a subclass of it
        rows, columns = model.patch_embed.dynamic_feat_size(img_size)
        tokens = rows * columns + model.num_prefix_tokens
    return Cost(count_parameters(model), counter.get_total_flops() // 2, tokens)


def training_operations(macs: int, forward_passes: int, teacher_macs: int = 0) -> int:
    """Return the operations of a training step for one image.

    Args:
        macs: multiply-accumulates of a forward pass; each is two operations.
        forward_passes: forward passes of the same cost: 3 for one pass with its backward pass, which counts as two.
        teacher_macs: multiply-accumulates of the teacher's forward pass.
    """
    return 2 * (macs * forward_passes + teacher_macs)


def activation_bytes(model: nn.Module, sides: tuple[int, int]) -> int:
    """Return the bytes of activations per image that a float32 training step saves for the backward pass.

    Measured in a forward pass of two images of (height, width) `sides`.
    """
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, UntypedStorage] = {}  # keeps the storages alive, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_heads(model, torch.zeros(2, 3, *sides))
    return sum(storage.nbytes() for storage in kept.values()) // 2
