"""Evo-LeViT: Evo-ViT (Xu et al., arXiv:2108.01390) on LeViT (Graham et al., arXiv:2104.01136).

A patch token's score is the class token's attention to it, averaged over the attentions so far. Blocks compute the
tokens with the best scores and one representative token, the mean of the others weighted by their scores (slow update).
What the blocks add to the representative token is added to each of the others (fast update). The scores get a gradient
through the weights of that mean.

Training is layer-wise first and stage-wise later (`LayerToStage`). Layer-wise, the newest attention has a fixed weight
in the scores; stage-wise, a learned one.

Numerically equal to the official code (github.com/YifanXu74/Evo-ViT, commit 4c5d9b3, `levit/`); its checkpoints load.

Different from timm's LeViT: a class token with two classifiers of its own, for training only; learned position tables,
at the input and at each downsampling, in place of attention biases; tokens are sequences (no `use_conv`).

Different from the official code (docs/fidelity.md has the whole table): timm's names, to which `convert_evo_levit`
converts; tokens stay in image order, where the official code sorts them by their scores.

Shapes: B images, N patch tokens, S selections, D channels, C classes, A attentions.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.levit import LevitDistilled, NormLinear, model_cfgs
from torch import Tensor, nn

from vitrail.models.registry import build, vit_cfg
from vitrail.models.slow_fast import SlowFastStage
from vitrail.models.token_selection import LayerToStage, block_ratios, check_shares, enlarge_masks
from vitrail.types import Outputs


class EvoLevit(LayerToStage, LevitDistilled):
    """timm's LeViT with a class token and Evo-ViT's selection of tokens.

    Args:
        keep_ratio: share of the patch tokens that the blocks from `first_selection` on compute, rounded down; or one
            share for each block.
        first_selection: first block that selects tokens, counted from 0 over all stages.
        tradeoff: weight of the newest attention in the scores while training is layer-wise.
        stage_wise_from: share of the epochs after which training selects once per stage instead of before every block.
        kwargs: arguments of timm's LeViT.

    Raises:
        ValueError: a ratio or weight is not possible, or the image size is no multiple of the stem's stride.
    """

    outputs = frozenset({"distill", "class_token", "class_token_distill", "decisions"})
    num_prefix_tokens = 1
    stages: Any

    def __init__(
        self,
        keep_ratio: float | Sequence[float] = 0.5,
        first_selection: int = 2,
        tradeoff: float = 0.5,
        stage_wise_from: float = 2 / 3,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("use_conv"):
            raise ValueError("use_conv=true: the tokens are selected from a sequence; set it to false.")
        super().__init__(**kwargs)
        self.image_size, self._stride = to_2tuple(kwargs.get("img_size", 224)), self.feature_info[0]["reduction"]
        if any(side % self._stride for side in self.image_size):
            raise ValueError(f"img_size={list(self.image_size)}: needs multiples of {self._stride}.")
        depths = [len(stage.blocks) for stage in self.stages]
        if not 1 <= first_selection <= sum(depths):
            raise ValueError(f"first_selection={first_selection}: needs a number of blocks from 1 to {sum(depths)}.")
        ratios = block_ratios(keep_ratio, sum(depths), first_selection)
        if ratios[0] < 1:
            raise ValueError(f"keep_ratio={list(ratios)}: the first block has no scores to select by; start with 1.")
        (self.tradeoff,) = check_shares("tradeoff", [tradeoff], 1)
        remaining = iter(ratios)
        self.stages = nn.ModuleList(
            SlowFastStage(stage, [next(remaining) for _ in stage.blocks]) for stage in self.stages
        )
        weight, (rows, columns) = next(self.parameters()), self.stages[0].grid
        self.cls_token = nn.Parameter(weight.new_zeros(1, 1, self.embed_dim[0]))
        self.pos_embed = nn.Parameter(weight.new_zeros(1, 1 + rows * columns, self.embed_dim[0]))
        trunc_normal_(self.pos_embed, std=0.02)
        # One row for each attention, so that adaptive gradient clipping treats them as separate units.
        self.tradeoff_logit = nn.Parameter(weight.new_zeros(sum(stage.num_attentions for stage in self.stages), 1))
        self._reset_class_heads()
        self.add_mode(stage_wise_from, kwargs.get("device"))

    def _reset_class_heads(self) -> None:
        for name in ("head_cls", "head_cls_dist"):
            head: nn.Module = nn.Identity()
            if self.num_classes:
                head = NormLinear(self.num_features, self.num_classes, drop=self.drop_rate).to(self.cls_token)
            setattr(self, name, head.train(self.training))

    # Checkpoints

    def convert_checkpoint(self, weights: Mapping[str, Tensor], _: str) -> dict[str, Tensor]:
        """Return weights under this model's names; those of official checkpoints are converted."""
        return convert_evo_levit(weights)

    def position_grids(self, image_size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """Return rows and columns of each position table for images of (height, width) pixels; None: the model's."""
        rows, columns = (side // self._stride for side in image_size or self.image_size)
        grids = {"pos_embed": (rows, columns)}
        for number in range(1, len(self.stages)):
            grids[f"stages.{number}.downsample.attn_downsample.pos_embed"] = (rows, columns)
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return grids

    # Forward

    def token_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the first stage's patch tokens for images of (height, width) pixels."""
        return self.position_grids(image_size)["pos_embed"]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens (B, 1 + N, D) of the last stage, the class token first."""
        return self._stages(x)[-1][0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return the mean of the logits (B, C) of both classifiers of the mean patch token of (B, 1 + N, D)."""
        return super().forward_head(x[:, 1:], pre_logits)

    def forward_outputs(self, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return the logits (B, C) of all classifiers, and `decisions`, for images (B, 3, H, W).

        `cls` and `distill` are those of the mean patch token, `class_token` and `class_token_distill` those of the
        class token. `decisions` (B, S, N) are 1 for the patches whose token each selection keeps; behind a
        downsampling, a token stands for several patches of the first grid.
        """
        stages = self._stages(images)
        tokens, pooled = stages[-1][0], self.forward_head(stages[-1][0], pre_logits=True)
        extras = {"class_token": self.head_cls(tokens[:, 0]), "class_token_distill": self.head_cls_dist(tokens[:, 0])}
        grid = self.stages[0].grid
        masks = [
            enlarge_masks(kept, stage.grid, grid, 2**number)
            for number, (stage, (_, _, kept)) in enumerate(zip(self.stages, stages, strict=True))
        ]
        return Outputs(self.head(pooled), None, self.head_dist(pooled), {**extras, "decisions": torch.cat(masks, 1)})

    def _stages(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each stage's tokens (B, 1 + N, D), scores (B, N) and decisions (B, S, N)."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        learned = self.tradeoff_logit.sigmoid()  # (A, 1)
        weights = learned if self._stage_wise else torch.full_like(learned, self.tradeoff)
        # Where they are not used, they get the gradient 0: DDP expects one for every parameter.
        class_token = self.cls_token + 0 * learned.sum()
        x = torch.cat((class_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        scores, results = None, []
        for stage, own in zip(self.stages, weights.split([stage.num_attentions for stage in self.stages]), strict=True):
            args = (x, scores, own, self._stage_wise)
            x, scores, kept = checkpoint(stage, *args) if self.grad_checkpointing and self.training else stage(*args)
            results.append((x, scores, kept))
        return results

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last tokens (B, 1 + N, D) and the patch tokens after stages as (B, D, rows, columns); as timm."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}: must be NCHW.")
        taken, _ = feature_take_indices(len(self.stages), indices)
        results = self._stages(x)
        maps = [
            results[number][0][:, 1:].transpose(1, 2).unflatten(2, self.stages[number].grid) for number in sorted(taken)
        ]
        return maps if intermediates_only else (results[-1][0], maps)

    # timm's methods

    def no_weight_decay(self) -> set[str]:
        """Return the position tables and the learned weights of the scores."""
        return {*self.position_grids(), "tradeoff_logit"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters for layer decay."""
        return {**super().group_matcher(coarse), "stem": r"^stem|^cls_token|^pos_embed|^tradeoff_logit"}

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return both classifiers of the mean patch token, then both of the class token."""
        return self.head, self.head_dist, self.head_cls, self.head_cls_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers by newly initialised ones for another number of classes."""
        super().reset_classifier(num_classes, global_pool)
        self._reset_class_heads()


_NAMES = (
    (r"^m1\.m\.", "attn."),
    (r"^(m2\.m|m)\.0\.", r"\1.ln1."),
    (r"^(m2\.m|m)\.2\.", r"\1.ln2."),
    (r"^m2\.m\.", "mlp."),
    (r"^m\.", ""),
    (r"\b(q|proj)\.1\.", r"\1.ln."),
    (r"\bposs$", "pos_embed"),
    (r"\b[cl]\.(?=weight|bias)", "linear."),
)


def convert_evo_levit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an official Evo-LeViT checkpoint (`levit/`) under vitrail's names; other weights unchanged.

    `blocks.i` is a block, a downsampling attention or its MLP. `stage_blocks` are second names of the same tensors.
    The scalars `learn_tradeoff` become the rows of `tradeoff_logit`. Published checkpoints are trained to the end:
    stage-wise.
    """
    if "blocks.0.m1.m.learn_tradeoff" not in weights:
        return dict(weights)
    converted, tradeoffs, prefixes = {"stage_wise": torch.tensor(True)}, [], _prefixes(weights)
    for key, value in weights.items():
        if key.startswith("stage_blocks."):
            continue
        if key.endswith("learn_tradeoff"):
            tradeoffs.append((int(key.split(".")[1]), value))
            continue
        prefix, name = "", re.sub(r"^patch_embed\.(\d)\.", lambda found: f"stem.conv{int(found[1]) // 2 + 1}.", key)
        if found := re.match(r"blocks\.(\d+)\.", key):
            prefix, name = prefixes[int(found[1])], key[found.end() :]
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        converted[prefix + name] = value
    converted["tradeoff_logit"] = torch.stack([value for _, value in sorted(tradeoffs, key=lambda pair: pair[0])])
    return converted


def _prefixes(weights: Mapping[str, Tensor]) -> dict[int, str]:
    """Return the start of vitrail's names for each official `blocks.i`."""
    stage, number, prefixes = 0, 0, {}
    for index in sorted({int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}):
        if f"blocks.{index}.kv.c.weight" in weights:
            stage, number = stage + 1, 0
            prefixes[index] = f"stages.{stage}.downsample.attn_downsample."
        elif f"blocks.{index}.m.0.c.weight" in weights:
            prefixes[index] = f"stages.{stage}.downsample.mlp."
        else:
            prefixes[index] = f"stages.{stage}.blocks.{number}."
            number += 1
    return prefixes


# ---------------------------------------------------------------------------------------------------- registration


def _cfg() -> dict[str, Any]:
    return vit_cfg(
        first_conv="stem.conv1.linear",
        classifier=("head.linear", "head_dist.linear", "head_cls.linear", "head_cls_dist.linear"),
        crop_pct=0.875,
        license="mit",
        paper_ids="arXiv:2108.01390",
    )


default_cfgs = generate_default_cfgs(
    {f"evo_levit_{size}.untrained": _cfg() for size in ("128s", "128", "192", "256", "384")}
)


@register_model
def evo_levit_128s(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-128S: 8.6 M parameters, 0.26 G MACs, 73.0 % top-1."""
    return build(EvoLevit, "evo_levit_128s", pretrained, kwargs, **model_cfgs["levit_128s"])


@register_model
def evo_levit_128(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-128: 0.31 G MACs, 74.4 % top-1."""
    return build(EvoLevit, "evo_levit_128", pretrained, kwargs, **model_cfgs["levit_128"])


@register_model
def evo_levit_192(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-192: 76.8 % top-1."""
    return build(EvoLevit, "evo_levit_192", pretrained, kwargs, **model_cfgs["levit_192"])


@register_model
def evo_levit_256(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-256: 78.8 % top-1; 81.1 % at 384 pixels."""
    return build(EvoLevit, "evo_levit_256", pretrained, kwargs, **model_cfgs["levit_256"])


@register_model
def evo_levit_384(pretrained: bool = False, **kwargs: Any) -> EvoLevit:
    """Evo-LeViT-384: 80.7 % top-1; 82.2 % at 384 pixels."""
    return build(EvoLevit, "evo_levit_384", pretrained, kwargs, **model_cfgs["levit_384"])
