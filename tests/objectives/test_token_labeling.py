import pytest
import torch

from vitrail.data.label_maps import sparse_token_targets
from vitrail.objectives import TokenLabelingLoss
from vitrail.types import Outputs, Targets


def batch(num_classes=50, grid=(4, 5), dtype=torch.float32):
    torch.manual_seed(0)
    scores = torch.randn(6, 3, 9, 9) * 4
    classes = torch.rand(6, num_classes, 9, 9).argsort(1)[:, :3]
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]]).expand(6, 4)
    targets = sparse_token_targets(scores, classes, boxes, torch.zeros(6, dtype=torch.bool), grid, num_classes)
    n = grid[0] * grid[1]
    tokens = (torch.randn(6, n, num_classes) * 3).to(dtype).requires_grad_()
    return (torch.randn(6, num_classes).to(dtype).requires_grad_()), tokens, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_sparse__same_loss_and_gradient_as_dense(dtype, mixed):
    results = []
    for dense in (False, True):
        cls, tokens, targets = batch(dtype=dtype)
        sparse = targets.tokens.mixed(torch.linspace(0, 1, 20)) if mixed else targets.tokens
        losses = TokenLabelingLoss(0.5)(
            Outputs(cls, tokens), Targets(targets.cls, sparse.to_dense() if dense else sparse)
        )
        (3 * losses["loss"]).backward()
        results.append((losses["loss"].detach(), losses["token_loss"].detach(), tokens.grad, cls.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_sparse__extreme_logits():
    cls, _, targets = batch()
    tokens = (torch.randn(6, 20, 50) * 300).requires_grad_()
    losses = TokenLabelingLoss()(Outputs(cls, tokens), Targets(targets.cls, targets.tokens))
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert tokens.grad.isfinite().all()


def test_sparse__gradient_only_once():
    cls, tokens, targets = batch()
    loss = TokenLabelingLoss()(Outputs(cls, tokens), Targets(targets.cls, targets.tokens))["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the token loss can be computed once only"):
        loss.backward()


def test_class_indices__equal_cross_entropy():
    logits, tokens = torch.randn(2, 3), torch.randn(2, 4, 3)
    losses = TokenLabelingLoss()(Outputs(logits, tokens), Targets(torch.tensor([2, 0])))
    torch.testing.assert_close(losses["cls_loss"], torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0])))
    each = torch.nn.functional.cross_entropy(tokens.flatten(0, 1), torch.tensor([2] * 4 + [0] * 4))
    torch.testing.assert_close(losses["token_loss"], each)


def test_token_labeling__needs_token_logits():
    with pytest.raises(ValueError, match=r"needs token logits; set model.token_head=true"):
        TokenLabelingLoss()(Outputs(torch.randn(2, 3)), Targets(torch.tensor([0, 1])))
