"""Class, token and distillation logits of a backbone, and MixToken.

A backbone declares its outputs besides class logits in `outputs`, a set of names (`tokens`, `distill`, or any other).
Such a backbone has

- `forward_outputs(images, token_box=None) -> Outputs`, and
- with `tokens`: `token_grid(image_size) -> (rows, columns)`; `mixes_tokens = True` if it can swap tokens in a box.

A backbone may also have
- `begin_epoch(epoch, epochs)`, called before each epoch of training (what it changes must be in the state dict),
- `position_grids(image_size=None)`, the grid (rows, columns) of each position table by its key, for the model's image
  size or another, if it has other tables than `pos_embed`,
- `new_modules`, names of modules that the weights of `init_from` may lack,
- `selection_blocks`, the blocks before which it selects tokens (with the output `decisions`, of each selection), and
- `convert_checkpoint(weights, source)`, which converts the names of official checkpoints.

`add_token_head` adds `forward_outputs` and `token_grid` to timm's models, and `return_features` lets them also return
their patch features. Callers use the functions of this file.

Shapes: B images, N patch tokens, D channels, C classes, H x W pixels, h x w cells of the token grid.
"""

from functools import cache, partial
from types import MethodType
from typing import Any

from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.features import classify_places, feature_grid, patch_features
from vitrail.models.token_mixing import mix_tokens
from vitrail.models.volo import TokenVOLO, declare_token_logits, has_token_logits
from vitrail.types import Outputs


def declared_outputs(model: nn.Module) -> frozenset[str]:
    """Return the names of a backbone's outputs, class logits (`cls`) included."""
    own = getattr(model, "outputs", None)
    if own is None:
        own = {"distill"} if isinstance(model, VisionTransformerDistilled) else ()
    return frozenset({"cls", *own, *({"features"} if _returns_features(model) else ())})


def return_features(model: nn.Module) -> bool:
    """Let `model` also return its patch features, as `outputs.features` (B, N, D); return whether it can.

    They are the result of `forward_features` at all positions in row-major order, without prefix tokens. MixToken swaps
    them back, as it does token logits. The weights stay the same. Models of timm can do it, with and without
    `add_token_head`; a backbone with a `forward_outputs` of its own declares `features` itself.
    """
    methods = all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features"))
    own = hasattr(model, "forward_outputs") and not isinstance(model, TokenHead | FeatureTokenHead)
    if methods and not own:
        model.returns_features = True  # type: ignore[assignment]
    return "features" in declared_outputs(model)


def _returns_features(model: nn.Module) -> bool:
    return bool(getattr(model, "returns_features", False))


def patch_drop_rate(model: nn.Module) -> float:
    """Return the share of patch tokens that `model` drops in training (timm's PatchDropout)."""
    return float(getattr(getattr(model, "patch_drop", None), "prob", 0.0) or 0.0)


def forward_heads(model: nn.Module, images: Tensor, token_box: Tensor | None = None) -> Outputs:
    """Return the logits of each head of `model`, in training and in evaluation mode.

    `model(images)` merges the heads into one (B, C) tensor; this function returns them separately.

    Args:
        model: any backbone.
        images: (B, 3, H, W).
        token_box: (4,) top, left, bottom, right in cells, for MixToken (arXiv:2104.10858, section 3.2). Tokens in the
            box are swapped between sample i and sample B - 1 - i before the first block. The token logits are swapped
            back, so that each belongs to its own image. The class token attends to both images, in proportion to the
            box.

    Raises:
        ConfigError: `token_box` is set and the backbone cannot swap tokens.
    """
    forward: Any = getattr(model, "forward_outputs", None)
    mixes = getattr(model, "mixes_tokens", False)
    if forward is None and has_token_logits(model):  # timm's VOLO as `timm.create_model` builds it
        forward, mixes = partial(TokenVOLO.forward_outputs, model), True
    if token_box is not None and not mixes:
        raise ConfigError(
            f"mixing: MixToken needs a backbone that swaps tokens after its stem; {type(model).__name__} does not."
        )
    if forward is None:
        return _forward_plain(model, images)
    return forward(images) if token_box is None else forward(images, token_box)


def _forward_plain(model: Any, images: Tensor) -> Outputs:
    if not isinstance(model, VisionTransformerDistilled) and not _returns_features(model):
        return Outputs(cls=model(images))
    features = model.forward_features(images)
    if isinstance(model, VisionTransformerDistilled):
        cls, distill = _class_heads(model, features)
    else:
        cls, distill = model.forward_head(features), None
    return Outputs(cls, distill=distill, extras=_extras(model, features, images))


def _extras(model: nn.Module, features: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Return the patch features (B, N, D) among a model's outputs, if it was asked for them."""
    if not _returns_features(model):
        return {}
    return {"features": patch_features(model, features, (images.shape[-2], images.shape[-1]))[0]}


def bind_forward_outputs(model: nn.Module) -> None:
    """Make `forward_outputs` a method of `model`, for strategies that wrap methods by name."""
    if not hasattr(model, "forward_outputs"):
        model.forward_outputs = MethodType(_forward_plain, model)  # type: ignore[assignment]


def token_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of `model`'s patch tokens for images of (height, width) pixels.

    Raises:
        ConfigError: the backbone declares no grid of tokens.
    """
    grid: Any = getattr(model, "token_grid", None)
    if grid is not None:
        return grid(image_size)
    patch_embed: Any = getattr(model, "patch_embed", None)
    if hasattr(patch_embed, "dynamic_feat_size"):
        return patch_embed.dynamic_feat_size(image_size)
    if _returns_features(model):
        return feature_grid(model, image_size)
    raise ConfigError(f"model: {type(model).__name__} has no token_grid; model.token_head=true adds token logits.")


def _class_heads(model: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return a distilled ViT's class and distillation logits, (B, C) each, from features (B, 2 + N, D)."""
    return model.head(model.head_drop(features[:, 0])), model.head_dist(model.head_drop(features[:, 1]))


class TokenHead(VisionTransformer):
    """Mixin for ViTs: a second classifier, `aux_head`, of every patch token.

    List it before the backbone's class among the bases. The logits of an image become those of its class token (or
    pooled tokens) plus half the maximum over the tokens, as LV-ViT evaluates (Jiang et al., arXiv:2104.10858).
    """

    mixes_tokens = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset_aux_head()

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of `forward_outputs` besides class logits."""
        return frozenset({"tokens", "distill"} if isinstance(self, VisionTransformerDistilled) else {"tokens"})

    def reset_aux_head(self) -> None:
        """Replace the classifier of tokens by a newly initialised one."""
        self.aux_head: nn.Module = _new_head(self, self.embed_dim)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return all classifiers, the classifier of tokens last."""
        others = super().get_classifier()
        return (*(others if isinstance(others, tuple) else (others,)), self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers by newly initialised ones for another number of classes."""
        super().reset_classifier(num_classes, global_pool)
        self.reset_aux_head()

    def token_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of patch tokens for images of (height, width) pixels."""
        return self.patch_embed.dynamic_feat_size(image_size)

    def token_logits(self, features: Tensor) -> Tensor:
        """Return logits (B, N, C) of the patch tokens from features (B, prefix + N, D)."""
        return self.aux_head(self.fc_norm(features[:, self.num_prefix_tokens :]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return merged logits (B, C) from features (B, prefix + N, D), or pooled features (B, D) with `pre_logits`."""
        logits = super().forward_head(x, pre_logits=pre_logits)
        if pre_logits or self.num_classes == 0:
            return logits
        return Outputs(logits, self.token_logits(x)).merged()

    def forward_outputs(self, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return the logits of all heads for images (B, 3, H, W); see `forward_heads`."""
        grid = self.token_grid((images.shape[-2], images.shape[-1]))
        if token_box is not None:
            features = self._forward_mixed(images, token_box, grid)
        else:
            features = self.forward_features(images)  # (B, prefix + N, D)
        if isinstance(self, VisionTransformerDistilled):
            cls, distill = _class_heads(self, features)
        else:
            cls, distill = super().forward_head(features), None
        tokens, extras = self.token_logits(features), _extras(self, features, images)
        if token_box is not None:
            tokens = mix_tokens(tokens, token_box, grid)
            extras = {name: mix_tokens(value, token_box, grid) for name, value in extras.items()}
        return Outputs(cls, tokens, distill, extras)

    def _forward_mixed(self, images: Tensor, box: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the features (B, prefix + N, D), with MixToken between patch embedding and position table."""
        x = mix_tokens(self.patch_embed(images), box, grid)
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)


class FeatureTokenHead(nn.Module):
    """Mixin for timm models other than ViTs: a second classifier, `aux_head`, at every position of the features.

    List it before the backbone's class among the bases. Each position goes separately through the model's own pooling
    and normalisation, and then through `aux_head`.
    """

    outputs = frozenset({"tokens"})
    num_classes: int

    def reset_aux_head(self) -> None:
        """Replace the classifier of tokens by a newly initialised one."""
        model: Any = self
        self.aux_head: nn.Module = _new_head(self, getattr(model, "head_hidden_size", None) or model.num_features)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return both classifiers, the classifier of tokens last."""
        return (super().get_classifier(), self.aux_head)  # type: ignore[misc]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replace both classifiers by newly initialised ones for another number of classes."""
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        self.reset_aux_head()

    def token_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of positions for images of (height, width) pixels."""
        return feature_grid(self, image_size)

    def token_logits(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return logits (B, N, C) of the positions of `features`, the result of `forward_features`."""
        return classify_places(self, features, image_size, self._classify)[0]

    def _classify(self, position: Tensor) -> Tensor:
        return self.aux_head(super().forward_head(position, pre_logits=True).flatten(1))  # type: ignore[misc]

    def forward_outputs(self, images: Tensor, token_box: Tensor | None = None) -> Outputs:
        """Return class and token logits for images (B, 3, H, W)."""
        model: Any = self
        features = model.forward_features(images)
        cls = super().forward_head(features)  # type: ignore[misc]
        tokens = self.token_logits(features, (images.shape[-2], images.shape[-1]))
        return Outputs(cls, tokens, extras=_extras(self, features, images))

    def forward(self, images: Tensor) -> Tensor:
        """Return merged logits (B, C) of images (B, 3, H, W)."""
        return self.forward_outputs(images).merged()


def _new_head(model: nn.Module, dim: int) -> nn.Module:
    """Return a linear classifier of `dim` channels, initialised as in LV-ViT; an identity if there are no classes."""
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    if num_classes == 0:
        return nn.Identity()
    weight = next(model.parameters())  # for device and precision
    head = nn.Linear(dim, num_classes, device=weight.device, dtype=weight.dtype)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


@cache
def _with_head(mixin: Any, backbone: Any) -> Any:
    return type(f"{backbone.__name__}WithTokenHead", (mixin, backbone), {})


def add_token_head(model: nn.Module) -> nn.Module:
    """Add token logits, which token labelling needs, to a timm model; return a model that has them unchanged.

    The model is changed in place: its class becomes a subclass with `aux_head`, and timm's methods stay available.
    ViTs also get MixToken, and so does VOLO, whose own `aux_head` is used. Other models (ConvNeXt, Swin, Mixer, ResNet,
    ...) get a classifier at each position of their feature map.

    Raises:
        ConfigError: the backbone has no spatial features.
    """
    if "tokens" in declared_outputs(declare_token_logits(model)):
        return model
    vit: Any = model
    backbone: Any = type(model)
    if isinstance(model, VisionTransformer):
        vit.__class__ = _with_head(TokenHead, backbone)
        vit.reset_aux_head()
        return model
    if isinstance(model, VOLO):
        raise ConfigError(
            "model.token_head=true: this VOLO lacks its class token or its own token classifier; omit"
            " model.global_pool, model.post_layers and model.use_aux_head."
        )
    if not all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features")):
        raise ConfigError(
            f"model.token_head=true: {type(model).__name__} has no spatial features; choose another backbone."
        )
    vit.__class__ = _with_head(FeatureTokenHead, backbone)
    vit.reset_aux_head()
    return model
