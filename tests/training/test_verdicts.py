"""The device keeps bad numbers from the optimiser, and the host learns of them one step later."""

from contextlib import nullcontext

import lightning as L
import pytest
import torch

from poisoned_training import POISON, Poison, fit
from resuming import copy_every_save, new_folder
from vitrail.errors import TrainingError
from vitrail.training import nonfinite_guard
from vitrail.training.fsdp import SpoilingReduction
from vitrail.training.verdicts import HostReader, judge, spoil_gradients

pytestmark = pytest.mark.thorough

SKIP = "callbacks.nonfinite_guard.on_bad=skip"


class LateReader(HostReader):
    """Reader for the CPU with the order of events on a GPU."""

    late = True


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(nonfinite_guard, "HostReader", LateReader)


@pytest.mark.parametrize(
    "optimizer",
    [
        ("optimizer=adamw", "optimizer.fused=true"),
        ("optimizer=adamw",),
        ("optimizer=adamw", "seed=42"),  # the first step is bad
        ("optimizer=sgd", "optimizer.fused=true"),
        ("optimizer=lamb", "optimizer.fused=true"),
        ("optimizer=muon",),
        ("optimizer=adamw", "optimizer.name=lookahead_adamw", "seed=4", "epochs=1"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
@pytest.mark.sample(2)
def test_skip__gives_the_weights_of_a_training_that_never_sees_the_step(tmp_path, monkeypatch, optimizer):
    """Skipping on the device equals leaving the update out on the host, bit for bit."""
    options = (SKIP, "seed=2", *optimizer, "data.batch_size=128", "schedule.warmup_epochs=0")
    host, device = Poison("blocks.1.attn.proj"), Poison("blocks.1.attn.proj")
    fit(new_folder(tmp_path / "host"), host, *options)
    monkeypatch.setattr(nonfinite_guard, "HostReader", LateReader)
    _, guard = fit(new_folder(tmp_path / "device"), device, *options)
    assert any(host.bad)
    assert guard.skipped == sum(host.bad)
    assert torch.equal(device.weights[-1], host.weights[-1])
    assert not torch.equal(device.weights[-1], device.weights[0])


class PoisonedImages(Poison):
    """Poison that follows the batch, also when the guard computes it again."""

    image = None

    def on_fit_start(self, trainer, module):
        def look(_, inputs):
            self.holds = inputs[0] is self.image

        super().on_fit_start(trainer, module)
        module.model.patch_embed.register_forward_pre_hook(look)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if POISON in batch.key:
            self.image = batch.image


def test_stop__saves_the_bad_step_and_the_weights_before_it(tmp_path, late):
    poison = PoisonedImages("blocks.1.attn.proj")
    sentence = r"epoch 1, step \d+: a loss of nan, first in the output of blocks.1.attn.proj"
    with pytest.raises(TrainingError, match=sentence):
        fit(tmp_path, poison)
    kept = torch.load(tmp_path / "bad_step.pt", weights_only=True)
    assert POISON in kept["batches"][0]["key"]
    assert kept["step"] == poison.bad.index(True) == len(poison.weights) - 1
    weights = torch.cat([weight.flatten() for weight in kept["weights"].values()])
    torch.testing.assert_close(weights, poison.weights[kept["step"] - 1], rtol=0, atol=0)


class BadGradient(L.Callback):
    """Callback that makes one weight's gradient infinite in step `number`; the loss stays finite."""

    def __init__(self, number):
        self.number = number

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.number:
            module.model.blocks[2].mlp.fc1.weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize("step", [2, 43])  # the last one of an epoch is judged before the validation
def test_gradient__infinite_with_a_finite_loss_is_located(tmp_path, late, step):
    sentence = f"epoch 1, step {step + 1}: a non-finite gradient, first in the gradient of blocks.2.mlp.fc1.weight"
    with pytest.raises(TrainingError, match=sentence):
        fit(tmp_path, BadGradient(step))


class SavedPoison(Poison):
    """Poison of a network with BatchNorm that copies every last.ckpt to the folder `copies`."""

    def __init__(self, copies):
        super().__init__("conv1")
        self.copies = new_folder(copies)

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        copy_every_save(trainer.strategy.checkpoint_io, self.copies)


BATCHNORM = (
    *("model=timm", "model.name=resnet10t", "data.image_size=32", "epochs=1", "data.batch_size=128"),
    *("trainer.limit_train_batches=10", "schedule.warmup_epochs=0", "seed=2"),
)


EACH = "+callbacks.each={_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1, save_top_k: -1}"


def assert_finite(path):
    """Check the raw and the EMA weights and the optimiser state of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    moments = [value for state in checkpoint["optimizer_states"][0]["state"].values() for value in state.values()]
    weights = [*checkpoint["state_dict"].values(), *checkpoint["current_model_state"].values()]
    assert all(torch.as_tensor(value).isfinite().all() for value in (*moments, *weights)), path


@pytest.mark.parametrize("on_bad", ["stop", "skip", "rollback"])
@pytest.mark.sample(1)
def test_last_checkpoint__of_a_bad_step_has_no_bad_statistics(tmp_path, late, on_bad):
    """The guard acts before the checkpoint after the bad step is saved; with `stop`, there is none."""
    poison = SavedPoison(tmp_path / "copies")
    options = (*BATCHNORM, f"callbacks.nonfinite_guard.on_bad={on_bad}", "callbacks.preemption.minutes=0")
    if on_bad == "stop":
        with pytest.raises(TrainingError, match="a loss of nan"):
            fit(tmp_path, poison, *options)
    else:
        _, guard = fit(tmp_path, poison, *options)
        assert guard.skipped + guard.returns == sum(poison.bad) == 1
        assert_finite(tmp_path / "checkpoints" / "last.ckpt")
    saved = sorted(poison.copies.iterdir())
    assert len(saved) == len(poison.bad) > 0  # `stop` ends before the bad step is recorded
    for path in saved:
        assert_finite(path)


@pytest.mark.parametrize("on_bad", ["stop", "skip", "rollback"])
@pytest.mark.sample(1)
def test_other_checkpoint__of_a_bad_step_has_no_bad_statistics(tmp_path, late, on_bad):
    """Lightning's callback saves before the guard knows of the step; the device has restored the statistics."""
    poison = Poison("conv1")
    options = (*BATCHNORM, f"callbacks.nonfinite_guard.on_bad={on_bad}", EACH)
    with nullcontext() if on_bad == "skip" else pytest.raises(TrainingError):
        fit(tmp_path, poison, *options)
    saved = list((tmp_path / "checkpoints" / "each").iterdir())
    assert len(saved) >= poison.bad.index(True) + 1
    for path in saved:
        assert_finite(path)


def test_skip__ends_the_training_at_the_limit(tmp_path, late):
    with pytest.raises(TrainingError, match=r"first in the output of head.*The last 3 steps had already been skipped"):
        fit(tmp_path, Poison("head", always=True), SKIP)


def test_rollback__drops_the_step_that_was_computed_meanwhile(tmp_path, late):
    poison = Poison("norm")
    last = f"callbacks.nonfinite_guard.last={tmp_path}/checkpoints/each/last.ckpt"
    rollback = ("callbacks.nonfinite_guard.on_bad=rollback", last, EACH.replace("-1", "1, save_last: true"))
    _, guard = fit(tmp_path, poison, *rollback, "schedule.warmup_epochs=0", "epochs=1")
    assert (guard.returns, guard.lr_scale) == (1, 0.5)
    (step,) = torch.tensor(poison.bad).nonzero().flatten().tolist()
    assert torch.equal(poison.weights[step], poison.weights[step - 1])
    assert torch.equal(poison.weights[step + 1], poison.weights[step])
    assert poison.rates[step + 1] == pytest.approx(poison.rates[step] / 2, rel=0.2)
    assert not torch.equal(poison.weights[step + 2], poison.weights[step])
    assert poison.weights[-1].isfinite().all()


def test_shards__whose_norms_overflow_only_together_are_good():
    """Another process may have smaller ones."""
    grads = [torch.full((1,), 1.5e19), torch.full((1,), 1.5e19)]
    assert not torch.linalg.vector_norm(torch.cat(grads)).isfinite()
    assert judge(torch.zeros(()), grads)[0] == 0


def test_reduction_to_shards__spoils_gradients_whose_norm_overflows(monkeypatch):
    """The norm of a shard with finite numbers may be infinite, and that of the other shards finite."""
    sent = []
    monkeypatch.setattr("vitrail.training.fsdp._reduce_scatter", lambda _, tensor, **__: sent.append(tensor.clone()))
    for gradient in ([3e19, 1.0], [1e19, 1.0], [float("inf"), 1.0]):
        SpoilingReduction()(None, torch.tensor(gradient), None, None)
    assert [tensor.isnan().all().item() for tensor in sent] == [True, False, True]
    assert sent[1].tolist() == pytest.approx([1e19, 1.0])


def test_spoil__a_non_finite_loss_reaches_every_gradient():
    for value, finite in ((2.0, True), (float("inf"), False)):
        weight = torch.ones(3, requires_grad=True)
        loss = (weight * 2).sum() + value
        spoil_gradients(loss)
        loss.backward()
        assert weight.grad.isfinite().all() == finite
        assert judge(torch.zeros(()), [weight.grad])[0] == (0 if finite else 1)
