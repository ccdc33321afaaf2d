"""So-ViT's second-order pooling as an option of other ViTs: `model.pool=second_order`.

Xie et al. (arXiv:2104.10935) also add their classifier to DeiT. Here, as in So-ViT-14, patch tokens are projected to 64
and 48 channels, and the pooled vector has a dropout of 0.5. The stem is not replaced, so the accuracies that the
paper gives for DeiT with So-ViT's stem and head do not apply.

Shapes: B images, N patch tokens, D channels of a token, C classes.
"""

from functools import cache
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.second_order import SecondOrderClassifier, so_vit_classifier


class SecondOrderHead(VisionTransformer):
    """Mixin for ViTs: add logits of the pooled patch tokens to those of timm's classifier.

    List it before the backbone's class among the bases.
    """

    uses_patch_tokens = True
    second_order: SecondOrderClassifier

    def add_second_order(self) -> None:
        """Add a newly initialised classifier of the pooled patch tokens."""
        weight = next(self.parameters())
        classifier = so_vit_classifier(self.embed_dim, self.num_classes, 64, 48, drop=0.5, class_token=False)
        self.second_order = classifier.to(weight.device, weight.dtype)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return timm's classifier and that of the pooled patch tokens."""
        return super().get_classifier(), self.second_order.visual_fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers by newly initialised ones for another number of classes."""
        super().reset_classifier(num_classes, global_pool)
        self.second_order.reset(num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, C) from features (B, prefix + N, D), or timm's pooled features (B, D) with `pre_logits`."""
        logits = super().forward_head(x, pre_logits=pre_logits)
        if pre_logits or self.num_classes == 0:
            return logits
        return logits + self.second_order(x[:, self.num_prefix_tokens :])


@cache
def _with_second_order(backbone: Any) -> Any:
    return type(f"{backbone.__name__}WithSecondOrder", (SecondOrderHead, backbone), {})


def add_second_order_head(model: nn.Module) -> nn.Module:
    """Add second-order pooling to a ViT, in place: its class becomes a subclass with `second_order`.

    Raises:
        ConfigError: the backbone is not a ViT with timm's classifier.
    """
    vit: Any = model
    backbone: Any = type(model)
    plain = isinstance(model, VisionTransformer) and backbone.forward_head is VisionTransformer.forward_head
    if not plain or isinstance(model, VisionTransformerDistilled):
        raise ConfigError(
            f"model.pool=second_order: {backbone.__name__} is not a ViT with a single classifier;"
            " choose another backbone or set model.pool=null."
        )
    vit.__class__ = _with_second_order(backbone)
    vit.add_second_order()
    return model
