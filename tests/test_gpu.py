"""Trainings on a GPU: no wait between two log points, bad steps are skipped there, compiled equals eager."""

import lightning as L
import pytest
import torch

from poisoned_training import Poison, fit
from vitrail.training.verdicts import Brake

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GPU = ("trainer=gpu", "data.num_workers=2", "data.batch_size=32", "trainer.log_every_n_steps=1000")


class NoWait(L.Callback):
    """Callback that makes PyTorch refuse to wait for the device between batches 5 and 35."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if 5 <= batch_idx < 35 else "default")

    def on_train_end(self, trainer, module):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("render", ["loader", "device"])
@pytest.mark.parametrize("compile_mode", ["null", "default"])
@pytest.mark.parametrize(
    "settings",
    [
        ("model=deit_nano", "mixing=mixup_cutmix"),
        ("model=deit_nano", "mixing=mixup_cutmix", "mixing.mode=elem"),
        ("model=vit_nano", "optimizer=lamb", "trainer.gradient_clip_val=1"),
        ("model=vit_nano", "callbacks.nonfinite_guard.on_bad=skip"),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_step__does_not_wait_for_the_device(tmp_path, settings, compile_mode, render):
    fit(tmp_path, NoWait(), *GPU, "epochs=1", f"compile={compile_mode}", f"data.render={render}", *settings)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon", "sgd"])
@pytest.mark.parametrize("fused", ["true", "false"])
def test_skip__the_device_leaves_the_bad_step_out(tmp_path, optimizer, fused):
    poison = Poison("blocks.1.attn.proj")
    options = ("compile=null", "callbacks.nonfinite_guard.on_bad=skip", f"optimizer={optimizer}")
    _, guard = fit(tmp_path, poison, *GPU, *options, f"optimizer.fused={fused}")
    assert guard.skipped == sum(poison.bad) == 2
    for step in torch.tensor(poison.bad).nonzero().flatten().tolist():
        assert step == 0 or torch.equal(poison.weights[step], poison.weights[step - 1])
    assert poison.weights[-1].isfinite().all()


def test_brake__restores_step_counts_on_the_host():
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=0.1, foreach=True)
    brake = Brake(optimizer)
    for bad in (False, True):
        weight.grad = torch.full_like(weight, torch.nan if bad else 1.0)
        brake.set(torch.tensor(float(bad), device="cuda"), [weight.grad])
        optimizer.step()
    brake.release()
    assert optimizer.state[weight]["step"] == 1
    assert weight.isfinite().all()


def test_compiled__loss_equals_eager(tmp_path):
    losses = []
    for mode in ("null", "default"):
        folder = tmp_path / mode
        folder.mkdir()
        trainer, _ = fit(folder, L.Callback(), *GPU, "epochs=1", f"compile={mode}", "trainer.precision=32-true")
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
