"""Second-order pooling: classify the covariance of patch tokens together with the class token.

"So-ViT: Mind Visual Tokens for Vision Transformer" and its second version "SoT: Delving Deeper into Classification Head
for Transformer" (Xie et al., arXiv:2104.10935 v1 and v2). Two projections of the tokens are multiplied to a
cross-covariance matrix, whose singular values are then raised to a power (svPN), so that a few of them do not dominate.
Numerically equal to the official code (github.com/jiangtaoxie/So-ViT, commits c2d076e and 5da3c37), whose names the
weights keep.

Differences from that code (docs/fidelity.md has the whole table):
- Covariance and power are computed in float32 under autocast. A matrix of zeros gives zero, with a gradient of zero;
  the official gradient is NaN.
- SoT subtracts one mean for all channels of a head, as published; `center="channel"` subtracts each channel's own.

Shapes: B images, N patch tokens, D channels of a token, C classes, K, L channels of the two projections, H heads,
W = K = L channels of a head.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TINY = 1e-12  # smallest singular value and length of a vector


def _full_precision(x: Tensor) -> Any:
    """Return a context in which the products of `x` are not autocast to half precision."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def power_normalize(
    x: Tensor, start: Tensor, alpha: float = 0.5, iterations: int = 1, num_values: int | None = 1
) -> Tensor:
    """Raise the largest singular values of matrices to the power `alpha`, by power iteration.

    The other singular values are divided by s^(1 - alpha) + 1e-5, with s the last one that was raised. With one
    iteration, as published, s is an estimate: 60 to 70 % of the largest singular value of a random matrix.

    Args:
        x: matrices (B, K, L).
        start: vector (K,) from which the iteration starts.
        alpha: exponent.
        iterations: steps of the power iteration for each singular value.
        num_values: number of singular values to raise; None raises all, and leaves no remainder.

    Returns:
        The normalised matrices (B, K, L).
    """
    raised, last = torch.zeros_like(x), torch.ones_like(x[:, :1, :1])
    for _ in range(min(x.shape[1:]) if num_values is None else num_values):
        left = start[:, None]  # (K, 1), later (B, K, 1)
        for _ in range(iterations):
            right = F.normalize(x.mT @ left, dim=1, eps=_TINY)  # (B, L, 1)
            left = F.normalize(x @ right, dim=1, eps=_TINY)  # (B, K, 1)
        last = (left.mT @ x @ right).clamp_min(_TINY)  # (B, 1, 1); a power of 0 has no finite gradient
        part = left @ right.mT  # (B, K, L), of rank 1
        x = x - last * part
        raised = raised + last**alpha * part
    return raised if num_values is None else raised + x / (last ** (1 - alpha) + 1e-5)


def matrix_sqrt(x: Tensor, iterations: int = 3) -> Tensor:
    """Approximate the square roots (B, K, K) of covariance matrices (B, K, K) by Newton-Schulz iterations.

    The normalisation of MPN-COV (Li et al., arXiv:1712.01034).
    """
    trace = x.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    root, inverse = x / trace, identity
    for _ in range(iterations):
        step = (3 * identity - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return trace.sqrt() * root


class PowerNorm(nn.Module):
    """`power_normalize` with a learned start vector, for matrices with K = `dim` rows."""

    def __init__(self, dim: int, alpha: float = 0.5, iterations: int = 1, num_values: int | None = 1) -> None:
        super().__init__()
        self.alpha, self.iterations, self.num_values = alpha, iterations, num_values
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start vector from the standard normal distribution."""
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map matrices (B, K, L) to the same shape."""
        start = self.weight.to(x.dtype)
        return power_normalize(x, start, self.alpha, self.iterations, self.num_values)


class CrossCovariance(nn.Module):
    """So-ViT's pooling: the covariance of two projections, each with BatchNorm and ReLU.

    Args:
        dim: width D of the tokens.
        rows, columns: channels K and L of the projections.
    """

    def __init__(self, dim: int, rows: int, columns: int) -> None:
        super().__init__()
        self.conv_dr_block = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            for width in (rows, columns)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as for a layer with ReLU, by their fan-out."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, tokens: Tensor) -> Tensor:
        """Map patch tokens (B, N, D) to covariances (B, K, L) in float32."""
        channels = tokens.mT.unsqueeze(-1)  # (B, D, N, 1)
        x, y = (_exact(block(channels).squeeze(-1)) for block in self.conv_dr_block)  # (B, K, N), (B, L, N)
        with _full_precision(x):
            return (x - x.mean(2, keepdim=True)) @ (y - y.mean(2, keepdim=True)).mT / tokens.shape[1]


class MultiHeadCovariance(nn.Module):
    """SoT's pooling: one covariance for each head, normalised with a start vector that the heads share.

    Args:
        dim: width D of the tokens.
        heads: number H of heads.
        width: channels W of a head.
        center: mean that is subtracted: "head", one for all channels of a head, as published, or "channel".

    Raises:
        ValueError: an unknown `center`.
    """

    def __init__(self, dim: int, heads: int, width: int, center: Literal["head", "channel"] = "head") -> None:
        super().__init__()
        if center not in ("head", "channel"):
            raise ValueError(f"pool_center={center}: choose head (as published) or channel.")
        self.heads, self.width = heads, width
        self.axes = (1, 3) if center == "head" else (1,)
        self.wr = nn.Linear(dim, 2 * heads * width, bias=False)
        self.norm = PowerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map patch tokens (B, N, D) to normalised covariances (B, H, W, W) in float32."""
        projected = _exact(self.wr(tokens)).unflatten(2, (2, self.heads, self.width))  # (B, N, 2, H, W)
        with _full_precision(projected):
            q, k = ((x - x.mean(self.axes, keepdim=True)).transpose(1, 2) for x in projected.unbind(2))  # (B, H, N, W)
            # The power iteration starts on the side of k.
            covariance = (k.mT @ q / tokens.shape[1]).flatten(0, 1)  # (B * H, W, W)
            return self.norm(covariance).mT.unflatten(0, (-1, self.heads))


class SecondOrderClassifier(nn.Module):
    """Sum of a linear classifier of the class token and one of the pooled patch tokens.

    Args:
        dim: width D of the tokens.
        num_classes: number C of classes; 0 omits the classifiers.
        representation: pooling, which maps tokens (B, N, D) to matrices.
        normalization: normalisation of the matrices, if the pooling does not contain it.
        pooled: number of elements of the matrices.
        drop: dropout of the pooled vector.
        class_token: False omits the classifier of the class token; `forward` then takes patch tokens only.
    """

    visual_fc: nn.Module
    cls_fc: nn.Module

    def __init__(
        self,
        dim: int,
        num_classes: int,
        representation: nn.Module,
        normalization: nn.Module | None,
        pooled: int,
        drop: float = 0.0,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        self.representation = representation
        self.normalization = nn.Identity() if normalization is None else normalization
        self.drop = nn.Dropout(drop)
        self.dim, self.pooled, self.class_token = dim, pooled, class_token
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the linear layers by newly initialised ones for another number of classes."""
        weight = next(self.representation.parameters())  # for device and precision
        widths = {"visual_fc": self.pooled, "cls_fc": self.dim}
        for name, width in widths.items() if self.class_token else [("visual_fc", self.pooled)]:
            layer: nn.Module = nn.Identity()
            if num_classes:
                layer = nn.Linear(width, num_classes, device=weight.device, dtype=weight.dtype)
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            setattr(self, name, layer.train(self.training))

    def pool(self, patches: Tensor) -> Tensor:
        """Return pooled vectors (B, K * L) of patch tokens (B, N, D)."""
        x = self.representation(patches)
        with _full_precision(x):
            return self.drop(self.normalization(x).flatten(1).to(patches.dtype))

    def forward(self, patches: Tensor, class_features: Tensor | None = None) -> Tensor:
        """Return logits (B, C) of patch tokens (B, N, D) and class token (B, D)."""
        logits = self.visual_fc(self.pool(patches))
        return logits if class_features is None else logits + self.cls_fc(class_features)


def so_vit_classifier(
    dim: int, num_classes: int, rows: int, columns: int, drop: float = 0.0, class_token: bool = True
) -> SecondOrderClassifier:
    """Return So-ViT's classifier: covariances (B, `rows`, `columns`) with power normalisation."""
    pooling, norm = CrossCovariance(dim, rows, columns), PowerNorm(rows)
    return SecondOrderClassifier(dim, num_classes, pooling, norm, rows * columns, drop, class_token)


def sot_classifier(
    dim: int, num_classes: int, heads: int, width: int, drop: float = 0.0, center: Any = "head"
) -> SecondOrderClassifier:
    """Return SoT's classifier: `heads` covariances (B, `width`, `width`) with power normalisation."""
    pooling = MultiHeadCovariance(dim, heads, width, center)
    return SecondOrderClassifier(dim, num_classes, pooling, None, heads * width**2, drop)
