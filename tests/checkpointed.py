"""Gradients with and without gradient checkpointing."""

from torch.testing import assert_close


def assert_same_gradients(build, loss):
    """Check that checkpointing leaves the gradients of `loss(model)` unchanged, for models that `build()` returns."""
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        model.set_grad_checkpointing(checkpointing)
        loss(model).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0]
    assert_close(*gradients)
