"""Token labelling (Jiang et al., "All Tokens Matter", arXiv:2104.10858): soft cross-entropy of every token.

Shapes: B images, N patch tokens, C classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitrail.objectives.classification import one_hot
from vitrail.objectives.contract import Objective
from vitrail.types import Outputs, SparseTokens, Targets
from vitrail_runtime.checking import NonNegative, checked


class _SparseCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy with sparse targets, computed without a dense target.

    With probabilities t_c = base + sum of the weights of class c, and S their sum over classes:
    loss = S * logsumexp(x) - base * sum(x) - sum_e weights_e * x[class_e]; its gradient is S * softmax(x) - t.
    The forward pass computes the gradient in place of the exponentials, so that one tensor of this size suffices.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, weights: Tensor, base: Tensor) -> Tensor:
        x = logits.detach().float()
        highest = x.amax(-1, keepdim=True)
        exps = (x - highest).exp_()
        sums = exps.sum(-1, keepdim=True)
        mass = weights.sum(-1) + base * x.shape[-1]
        lse = (sums.log() + highest).squeeze(-1)
        chosen = (x.gather(-1, classes) * weights).sum(-1)
        if ctx.needs_input_grad[0]:
            exps.mul_(mass[..., None] / sums).sub_(base[..., None]).scatter_add_(-1, classes, -weights)
            ctx.gradient = exps.to(logits.dtype)
        return (mass * lse - base * x.sum(-1) - chosen).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient is None:
            raise RuntimeError(
                "objective: the gradient of the token loss can be computed once only; compute the loss again."
            )
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad), None, None, None


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (..., C) with probabilities (..., C), which need not sum to 1."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


@checked
class TokenLabelingLoss(Objective):
    """cls_weight * loss of the class token + token_weight * mean loss of the patch tokens.

    Targets are already smoothed and mixed. Sparse token targets give the same loss and gradient as dense ones, in a
    fraction of the time and memory. Without token targets, every patch token learns the target of the class token, as
    published; training does not start without them unless token_weight is 0.

    Args:
        token_weight: weight of the patch tokens; 1.0 in the official code, 0.5 in the paper.
        cls_weight: weight of the class token.
    """

    def __init__(self, token_weight: NonNegative = 1.0, cls_weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.token_weight, self.cls_weight = token_weight, cls_weight
        self.needs = frozenset({"outputs.tokens", "token_targets"} if token_weight else {"outputs.tokens"})
        self.optional = frozenset({"token_targets"})

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss` and its parts `cls_loss` and `token_loss` from logits (B, C), (B, N, C) and targets.

        Raises:
            ValueError: the outputs contain no token logits.
        """
        if outputs.tokens is None:
            raise ValueError(
                "objective: token labelling needs token logits; set model.token_head=true or use an LV-ViT."
            )
        cls = targets.cls
        if cls.ndim == 1:
            cls = one_hot(cls, outputs.cls.shape[-1]).to(outputs.cls.dtype)
        class_loss = soft_cross_entropy(outputs.cls, cls)
        if isinstance(targets.tokens, SparseTokens):
            count = outputs.tokens.shape[0] * outputs.tokens.shape[1]
            token_loss = _SparseCrossEntropy.apply(outputs.tokens, *targets.tokens[:3]) / count
        else:
            token_loss = soft_cross_entropy(outputs.tokens, cls[:, None] if targets.tokens is None else targets.tokens)
        loss = self.cls_weight * class_loss + self.token_weight * token_loss
        return {"loss": loss, "cls_loss": class_loss, "token_loss": token_loss}
