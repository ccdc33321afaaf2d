"""T2T-ViT: Tokens-to-Token ViT (Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on
ImageNet", arXiv:2101.11986), and the CNN designs that the paper studies.

A tokens-to-token stem, a class token, a fixed sinusoid position table, and a deep, narrow ViT without bias in q, k, v.
Numerically equal to the official code (github.com/yitu-opensource/T2T-ViT, commit 0f63dc9); its checkpoints load.

What to know about that code, and differences from it (docs/fidelity.md has the whole table):
- The performer keeps its published dropout of 0.1 and its eps; `token_drop=0` and `performer_eps=0` turn them off.
  Its computation neither overflows nor divides 0 by 0.
- Images need not be square, and their sides need not be multiples of 16: the grid follows from the splits.
- The attention scale is always head_dim^-1/2; the official `pretrained=True` sets embed_dim^-1/2, but the published
  weights were not trained with it.
- Position table and random features are buffers: in checkpoints as published, but not in `parameters()` and so not in
  the optimiser.
- The dense variant's stochastic depth depends on the stage, on a ramp of 12 steps, as published: a rate of 0.1 gives
  at most 0.027. `drop_path_by="block"` makes it linear over the blocks, as in the other variants.
- `drop_rate` is timm's (before the classifier); the official one is `pos_drop_rate` and `proj_drop_rate` together.
- `tokens_type="convolution"` is not supported; in the official code it fails.

Shapes: B images, C channels, N tokens, H x W pixels.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitrail.models.cnn_designs import (
    DenseBlock,
    GhostAttention,
    GhostBlock,
    GhostMlp,
    SqueezeExciteAttention,
    Transition,
)
from vitrail.models.heads import declared_outputs
from vitrail.models.mlp import LeanMlp, normed_mlp
from vitrail.models.registry import build, vit_cfg
from vitrail.models.sinusoid import SinusoidViT
from vitrail.models.tokens_to_token import TokensToToken

_NORM = partial(nn.LayerNorm, eps=1e-5)


class T2TViT(SinusoidViT):
    """ViT with a tokens-to-token stem and a fixed position table, whose first row is the class token's.

    Args:
        tokens_type, token_dim, token_drop, performer_eps: see `TokensToToken`.
        kwargs: arguments of timm's VisionTransformer.
    """

    stem_name = "tokens_to_token"

    def __init__(
        self,
        tokens_type: str = "performer",
        token_dim: int = 64,
        token_drop: float = 0.1,
        performer_eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        stem = partial(
            TokensToToken,
            tokens_type=tokens_type,
            token_dim=token_dim,
            token_drop=token_drop,
            performer_eps=performer_eps,
        )
        defaults = {"qkv_bias": False, "norm_layer": _NORM, "block_fn": ClassTokenBlock, "mlp_layer": LeanMlp}
        super().__init__(embed_layer=stem, **{**defaults, **kwargs})

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes).

        In training, the last block computes only the class token, because its other tokens are not used. Logits and
        gradients stay the same, for 5 % less compute (T2T-ViT-14). In evaluation all tokens are computed, as forward
        hooks expect.
        """
        if not self.training or mask or not self._only_class_token_is_used():
            return super().forward(x, **mask)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        last = self.blocks[-1]
        for block in self.blocks[:-1]:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        x = checkpoint(last, x, True) if self.grad_checkpointing else last(x, True)
        return self.forward_head(self.norm(x))

    def _only_class_token_is_used(self) -> bool:
        last = self.blocks[-1]
        plain = type(last) is ClassTokenBlock and type(last.attn) is Attention
        plain = plain and not getattr(self, "uses_patch_tokens", False)
        return plain and self.global_pool == "token" and "tokens" not in declared_outputs(self)


class ClassTokenBlock(Block):
    """timm's block with an option to compute only the class token."""

    def forward(self, x: Tensor, class_token_only: bool = False, **mask: Any) -> Tensor:
        """Map (B, N, C) to the same shape, or with `class_token_only` to the first token (B, 1, C)."""
        if not class_token_only:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **mask)))
            return x + self.drop_path2(self.ls2(normed_mlp(self.mlp, self.norm2, x)))
        tokens, attn = self.norm1(x), self.attn
        dim = attn.num_heads * attn.head_dim
        weights = attn.qkv.weight.split((dim, 2 * dim))
        biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split((dim, 2 * dim))
        q = F.linear(tokens[:, :1], weights[0], biases[0]).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        k, v = F.linear(tokens, weights[1], biases[1]).unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = attn.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=dropout)
        out = attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
        x = x[:, :1] + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(normed_mlp(self.mlp, self.norm2, x)))


class T2TViTDense(T2TViT):
    """T2T-ViT with dense connections: each block adds `growth` features; the width is halved between stages.

    Args:
        stages: number of blocks in each stage.
        growth: features that each block adds.
        drop_path_by: "stage" as published (stage i gets step i of a ramp of 12), or "block": linear over the blocks.
        kwargs: see `T2TViT`; `embed_dim` is the width before the first block.

    Raises:
        ValueError: an unknown `drop_path_by`.
    """

    def __init__(
        self,
        stages: tuple[int, ...] = (3, 6, 6, 4),
        growth: int = 64,
        drop_path_by: str = "stage",
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        **kwargs: Any,
    ) -> None:
        if drop_path_by not in ("stage", "block"):
            raise ValueError(f"drop_path_by={drop_path_by}: choose stage or block.")
        super().__init__(depth=0, weight_init="skip", **kwargs)
        ramp = calculate_drop_path_rates(drop_path_rate, 12 if drop_path_by == "stage" else sum(stages))
        shared = {"num_heads": kwargs["num_heads"], "mlp_ratio": kwargs["mlp_ratio"], "norm_layer": _NORM}
        drops = {"proj_drop": kwargs.get("proj_drop_rate", 0.0), "attn_drop": kwargs.get("attn_drop_rate", 0.0)}
        layers: list[nn.Module] = []
        widths: list[int] = []
        dim: int = kwargs["embed_dim"]
        block = 0
        for stage, depth in enumerate(stages):
            for _ in range(depth):
                rate = ramp[stage if drop_path_by == "stage" else block]
                layers.append(DenseBlock(dim, growth, drop_path=rate, **shared, **drops))
                dim, block = dim + growth, block + 1
                widths.append(dim)
            if stage < len(stages) - 1:
                layers.append(Transition(dim))
                dim //= 2
                widths.append(dim)
        self.blocks = nn.Sequential(*layers)
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": w, "reduction": 16} for i, w in enumerate(widths)]
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.norm = _NORM(dim)
        self.reset_classifier(self.num_classes)
        self.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        if weight_init != "skip":
            self.init_weights(weight_init, needs_reset=False)


# ---------------------------------------------------------------------------------------------------- registration

_RELEASES = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"


def _cfg(file: str = "", side: int = 224, first: str = "attention1.kqv") -> dict[str, Any]:
    return vit_cfg(
        url=_RELEASES + file if file else "",
        input_size=(3, side, side),
        first_conv=f"tokens_to_token.{first}",
        license="bsd-3-clause-clear",
        paper_ids="arXiv:2101.11986",
    )


default_cfgs = generate_default_cfgs(
    {
        "t2t_vit_7.in1k": _cfg("71.7_T2T_ViT_7.pth.tar"),
        "t2t_vit_10.in1k": _cfg("75.2_T2T_ViT_10.pth.tar"),
        "t2t_vit_12.in1k": _cfg("76.5_T2T_ViT_12.pth.tar"),
        "t2t_vit_14.in1k": _cfg("81.5_T2T_ViT_14.pth.tar"),
        "t2t_vit_14.in1k_384": _cfg("83.3_T2T_ViT_14.pth.tar", side=384),
        "t2t_vit_19.in1k": _cfg("81.9_T2T_ViT_19.pth.tar"),
        "t2t_vit_24.in1k": _cfg("82.3_T2T_ViT_24.pth.tar"),
        "t2t_vit_24.in1k_token_labels": _cfg("84.2_T2T_ViT_24.pth.tar"),
        "t2t_vit_t_14.in1k": _cfg("81.7_T2T_ViTt_14.pth.tar", first="attention1.attn.qkv"),
        "t2t_vit_t_19.in1k": _cfg("82.4_T2T_ViTt_19.pth.tar", first="attention1.attn.qkv"),
        "t2t_vit_t_24.in1k": _cfg("82.6_T2T_ViTt_24.pth.tar", first="attention1.attn.qkv"),
        "t2t_vit_14_resnext.untrained": _cfg(),
        "t2t_vit_14_wide.untrained": _cfg(),
        "t2t_vit_14_se.untrained": _cfg(),
        "t2t_vit_16_ghost.untrained": _cfg(),
        "t2t_vit_dense.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **architecture: Any) -> T2TViT:
    return build(architecture.pop("model_class", T2TViT), variant, pretrained, kwargs, **architecture)


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-7: 4.3 M parameters, 1.1 G MACs, 71.7 % top-1."""
    return _create("t2t_vit_7", pretrained, kwargs, embed_dim=256, depth=7, num_heads=4, mlp_ratio=2)


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-10: 5.9 M parameters, 1.5 G MACs, 75.2 % top-1."""
    return _create("t2t_vit_10", pretrained, kwargs, embed_dim=256, depth=10, num_heads=4, mlp_ratio=2)


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-12: 6.9 M parameters, 1.8 G MACs, 76.5 % top-1."""
    return _create("t2t_vit_12", pretrained, kwargs, embed_dim=256, depth=12, num_heads=4, mlp_ratio=2)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14: 21.5 M parameters, 4.8 G MACs, 81.5 % top-1; 83.3 % at 384 pixels."""
    return _create("t2t_vit_14", pretrained, kwargs, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3)


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-19: 39.2 M parameters, 8.5 G MACs, 81.9 % top-1."""
    return _create("t2t_vit_19", pretrained, kwargs, embed_dim=448, depth=19, num_heads=7, mlp_ratio=3)


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-24: 64.1 M parameters, 13.8 G MACs, 82.3 % top-1; 84.2 % with token labels."""
    return _create("t2t_vit_24", pretrained, kwargs, embed_dim=512, depth=24, num_heads=8, mlp_ratio=3)


_TRANSFORMER = {"tokens_type": "transformer", "mlp_ratio": 3}


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-14, transformer tokens: 21.5 M parameters, 6.1 G MACs, 81.7 % top-1."""
    return _create("t2t_vit_t_14", pretrained, kwargs, embed_dim=384, depth=14, num_heads=6, **_TRANSFORMER)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-19, transformer tokens: 39.2 M parameters, 9.8 G MACs, 82.4 % top-1."""
    return _create("t2t_vit_t_19", pretrained, kwargs, embed_dim=448, depth=19, num_heads=7, **_TRANSFORMER)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-24, transformer tokens: 64.1 M parameters, 15.0 G MACs, 82.6 % top-1."""
    return _create("t2t_vit_t_24", pretrained, kwargs, embed_dim=512, depth=24, num_heads=8, **_TRANSFORMER)


@register_model
def t2t_vit_14_resnext(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with 32 narrow heads, like ResNeXt's cardinality: 21.5 M parameters."""
    return _create("t2t_vit_14_resnext", pretrained, kwargs, embed_dim=384, depth=14, num_heads=32, mlp_ratio=3)


@register_model
def t2t_vit_14_wide(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Shallow and wide T2T-ViT, like Wide ResNet: width 768, depth 4."""
    return _create("t2t_vit_14_wide", pretrained, kwargs, embed_dim=768, depth=4, num_heads=12, mlp_ratio=3)


@register_model
def t2t_vit_14_se(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with squeeze-and-excitation in every attention: 21.8 M parameters."""
    config = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3, "attn_layer": SqueezeExciteAttention}
    return _create("t2t_vit_14_se", pretrained, kwargs, **config)


@register_model
def t2t_vit_16_ghost(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-16 with ghost attention and ghost MLPs: 16.3 M parameters."""
    layers = {"attn_layer": GhostAttention, "mlp_layer": GhostMlp, "block_fn": GhostBlock}
    config = {"embed_dim": 384, "depth": 16, "num_heads": 6, "mlp_ratio": 3, **layers}
    return _create("t2t_vit_16_ghost", pretrained, kwargs, **config)


@register_model
def t2t_vit_dense(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT with dense connections: 23.6 M parameters, 5.3 G MACs."""
    config = {"model_class": T2TViTDense, "embed_dim": 128, "num_heads": 8, "mlp_ratio": 2}
    return _create("t2t_vit_dense", pretrained, kwargs, **config)
