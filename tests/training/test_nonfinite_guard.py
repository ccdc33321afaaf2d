"""Non-finite steps in real runs of the digits are detected, located, saved and handled as configured."""

import lightning as L
import pytest
import torch

from poisoned_training import POISON, Poison, fit
from vitrail.errors import ConfigError, TrainingError
from vitrail.training import NonfiniteGuard

pytestmark = pytest.mark.thorough


def test_stop__names_the_module_and_saves_the_step(tmp_path):
    poison = Poison("blocks.1.attn.proj")
    with pytest.raises(
        TrainingError, match=r"epoch 1, step \d+: a loss of nan, first in the output of blocks.1.attn.proj"
    ):
        fit(tmp_path, poison)
    kept = torch.load(tmp_path / "bad_step.pt", weights_only=True)
    (batch,) = kept["batches"]
    assert POISON in batch["key"]
    assert batch["image"].shape == (32, 3, 16, 16)
    assert kept["step"] == len(poison.weights)
    torch.testing.assert_close(torch.cat([weight.flatten() for weight in kept["weights"].values()]), poison.weights[-1])


def test_skip__skips_the_step(tmp_path):
    poison = Poison("blocks.1.attn.proj")
    trainer, guard = fit(tmp_path, poison, "callbacks.nonfinite_guard.on_bad=skip")
    assert guard.skipped == sum(poison.bad) == 2  # once per epoch
    assert trainer.global_step == 2 * 44
    for step in range(1, 88):
        same = torch.equal(poison.weights[step], poison.weights[step - 1])
        assert same == poison.bad[step]
    assert poison.weights[-1].isfinite().all()


@pytest.mark.slow
def test_skip__restores_batchnorm_statistics(tmp_path):
    poison = Poison("conv1")
    overrides = (
        "model=timm",
        "model.name=resnet10t",
        "data.image_size=32",
        "epochs=1",
        "trainer.limit_train_batches=10",
    )
    trainer, _ = fit(tmp_path, poison, *overrides, "callbacks.nonfinite_guard.on_bad=skip", "data.batch_size=128")
    assert any(poison.bad)
    assert all(buffer.isfinite().all() for buffer in trainer.lightning_module.model.buffers())


def test_skip__ends_the_training_at_the_limit(tmp_path):
    with pytest.raises(TrainingError, match=r"first in the output of head.*The last 3 steps had already been skipped"):
        fit(tmp_path, Poison("head", always=True), "callbacks.nonfinite_guard.on_bad=skip")


def test_rollback__restores_the_checkpoint_and_lowers_the_learning_rate(tmp_path):
    """The poisoned image also occurs in the first epoch, so a checkpoint is saved after every step."""
    poison = Poison("norm")
    overrides = (
        "callbacks.nonfinite_guard.on_bad=rollback",
        "callbacks.preemption.minutes=0",
        "schedule.warmup_epochs=0",
    )
    _, guard = fit(tmp_path, poison, *overrides)
    assert guard.returns == 2
    assert guard.lr_scale == 0.25
    for step in torch.tensor(poison.bad).nonzero().flatten().tolist():
        torch.testing.assert_close(poison.weights[step], poison.weights[step - 1], rtol=0, atol=0)
        assert poison.rates[step] == pytest.approx(poison.rates[step - 1] / 2, rel=0.2)
    assert poison.weights[-1].isfinite().all()
    end = poison.rates[-1]
    assert end < 3e-6  # a quarter of the schedule's 1e-5
    _, again = fit(tmp_path, L.Callback(), "epochs=3", ckpt=tmp_path / "checkpoints" / "last.ckpt")
    assert (again.returns, again.lr_scale) == (2, 0.25)


def test_rollback__without_a_checkpoint_ends_the_training(tmp_path):
    with pytest.raises(TrainingError, match="There is no checkpoint yet to roll back to"):
        fit(tmp_path, Poison("norm", always=True), "callbacks.nonfinite_guard.on_bad=rollback")


class BadGradient(L.Callback):
    """Callback that makes one weight's gradient infinite in the third step; the loss stays finite."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 2:
            module.model.blocks[2].mlp.fc1.weight.grad[0, 0] = float("inf")


def test_gradient__infinite_with_a_finite_loss_is_located(tmp_path):
    sentence = "step 3: a non-finite gradient, first in the gradient of blocks.2.mlp.fc1.weight"
    with pytest.raises(TrainingError, match=sentence):
        fit(tmp_path, BadGradient())


def test_options__invalid_ones_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"on_bad=hope: must be one of stop, skip, rollback"):
        NonfiniteGuard(tmp_path, tmp_path, on_bad="hope")
    with pytest.raises(ConfigError, match=r"factor=2: must be a number above 0 and at most 1"):
        NonfiniteGuard(tmp_path, tmp_path, factor=2)
