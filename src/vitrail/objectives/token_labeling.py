"""Token labelling (Jiang et al., "All Tokens Matter", arXiv:2104.10858): soft cross-entropy of every token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitrail.types import Heads, SparseTokens, Targets


class _SparseCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy with sparse targets, without any dense target.

    With probabilities t_c = base + sum of the weights of class c, and S their sum over classes:
    loss = S * logsumexp(x) - base * sum(x) - sum_e weights_e * x[class_e]; its gradient is S * softmax(x) - t.
    The forward pass makes the gradient out of the exponentials that it needs anyway, in the one tensor of their size.
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
            raise RuntimeError("The token loss can be differentiated once; its gradient was given away.")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad), None, None, None


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of probabilities (..., C), which need not sum to 1, mean over all but the classes."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


class TokenLabelingLoss(nn.Module):
    """cls_weight * loss of the class token + dense_weight * mean loss of the patch tokens.

    Targets come smoothed. Sparse token targets give the same loss and gradient as dense ones in a fraction of their
    time and memory. Without token targets every patch token learns the target of the class token, as published.

    Args:
        dense_weight: of the patch tokens; 1.0 in the official code, 0.5 in the paper.
        cls_weight: of the class token.
        ground_truth: how the labels of the data set (`Targets.truth`) enter the target of the class token: `none`;
            `published`: half of each where annotator and truth agree on the best class, else 0.9 annotator and 0.1
            truth; `intended`, as the comment of the official code has it: trust the truth more where the annotator is
            wrong, half of each where they agree, else 0.1 annotator and 0.9 truth.
        smoothing: of the targets, which whoever makes them reads here (see `token_targets`).
        transpose_crops: likewise; True takes labels from the transposed crop, as the official code does.

    Raises:
        ValueError: an unknown `ground_truth`.
    """

    needs_tokens = True

    def __init__(
        self,
        dense_weight: float = 1.0,
        cls_weight: float = 1.0,
        ground_truth: str = "none",
        smoothing: float = 0.1,
        transpose_crops: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"objective.smoothing={smoothing}: must lie in [0, 1).")
        if ground_truth not in ("none", "published", "intended"):
            raise ValueError(f"objective.ground_truth={ground_truth}: choose none, published or intended.")
        self.dense_weight, self.cls_weight, self.ground_truth = dense_weight, cls_weight, ground_truth
        self.smoothing, self.transpose_crops = smoothing, transpose_crops

    def forward(self, heads: Heads, targets: Targets) -> dict[str, Tensor]:
        """`loss` and its parts `cls_loss` and `token_loss`, from logits (B, C), (B, N, C) and targets.

        Raises:
            ValueError: the backbone gave no token logits.
        """
        if heads.tokens is None:
            raise ValueError(
                "objective: token labelling needs token logits; set model.dense_head=true or use an LV-ViT."
            )
        cls = targets.cls
        if cls.ndim == 1:
            cls = nn.functional.one_hot(cls, heads.cls.shape[-1]).to(heads.cls.dtype)
        mixed = self._with_truth(cls, targets.truth)
        if targets.share is not None:  # after the truth, as published
            mixed = targets.share * mixed + (1 - targets.share) * mixed.flip(0)
        class_loss = soft_cross_entropy(heads.cls, mixed)
        if isinstance(targets.tokens, SparseTokens):
            count = heads.tokens.shape[0] * heads.tokens.shape[1]
            token_loss = _SparseCrossEntropy.apply(heads.tokens, *targets.tokens[:3]) / count
        else:
            dense = cls[:, None] if targets.tokens is None else targets.tokens
            token_loss = soft_cross_entropy(heads.tokens, dense)
        loss = self.cls_weight * class_loss + self.dense_weight * token_loss
        return {"loss": loss, "cls_loss": class_loss, "token_loss": token_loss}

    def _with_truth(self, labels: Tensor, truth: Tensor | None) -> Tensor:
        if self.ground_truth == "none" or truth is None:
            return labels
        disagreeing = 0.9 if self.ground_truth == "published" else 0.1
        agree = labels.argmax(-1, keepdim=True) == truth.argmax(-1, keepdim=True)
        ratio = torch.where(agree, 0.5, disagreeing)
        return ratio * labels + (1 - ratio) * truth
