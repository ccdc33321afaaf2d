"""Settings whose best value depends on the device: `auto` is replaced before the run is recorded."""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_ORDERS = {
    "cudnn": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
    "flash": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ),
}
"""Kernels of attention by the value of `kernels.attention`; the first one that supports the tensors is used."""


def settle_auto(config: DictConfig) -> None:
    """Replace `auto` by the value for the device of the training, in place."""
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if on_gpu else (0, 0)
    # PyTorch's compiler writes kernels in Triton, which needs Volta.
    compiles = capability >= (7, 0) and importlib.util.find_spec("triton") is not None
    choices = {
        "compile": "default" if compiles else None,
        "optimizer.fused": _is_faster_fused(config, on_gpu),
        "kernels.attention": ("cudnn" if capability[0] == 9 else "flash") if on_gpu else None,
        "kernels.tf32": capability >= (8, 0),
        "kernels.channels_last": capability >= (7, 0),
    }
    for key, value in choices.items():
        if OmegaConf.select(config, key) == "auto":
            OmegaConf.update(config, key, value)


def _is_faster_fused(config: DictConfig, on_gpu: bool) -> bool:
    """Return whether to update all parameters at once: on a GPU, and on CPUs where PyTorch has a kernel for it."""
    if on_gpu:  # loss scaling with gradient clipping needs unscaled gradients before the update
        return config.trainer.precision != "16-mixed"
    on_cpu = config.trainer.accelerator == "cpu" or not torch.accelerator.is_available()
    return on_cpu and OmegaConf.select(config, "optimizer.name") in ("adam", "adamw")


@contextmanager
def kernels(config: DictConfig) -> Iterator[None]:
    """Use the kernels of `config.kernels` within the block."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    with ExitStack() as stack:
        if order := ATTENTION_ORDERS.get(str(OmegaConf.select(config, "kernels.attention"))):
            stack.enter_context(sdpa_kernel(list(order), set_priority=True))
        if (tf32 := OmegaConf.select(config, "kernels.tf32")) is not None and torch.cuda.is_available():
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = bool(tf32)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = convolutions
