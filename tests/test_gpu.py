"""Trainings that need a GPU: no wait between two log points, skipped steps, memory; others in test_on_device.py."""

import lightning as L
import pytest
import torch

from poisoned_training import Poison, fit
from untrained_teacher import untrained_teacher
from vitrail.commands.train import train
from vitrail.commands.tune import tune
from vitrail.errors import TrainingError
from vitrail.runs.config import compose
from vitrail.runs.measured_config import training_config
from vitrail.runs.measuring import MeasuredTraining
from vitrail.runs.poll import Poll
from vitrail.training.peaks import peak_operations
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
        ("model=deit_nano", "model.token_head=true", "objective=token_labeling", "mixing=mixtoken"),
        ("model=deit_nano", "model.name=deit_nano_distilled", "objective=distillation"),
        ("model=dynamicvit", "model.name=dynamicvit_deit_tiny", "objective=dynamicvit"),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_step__does_not_wait_for_the_device(tmp_path, maps, settings, compile_mode, render):
    if "mixing=mixtoken" in settings:
        settings = (*settings, f"+data.label_maps={maps}")
    if {"objective=distillation", "objective=dynamicvit"} & set(settings):
        settings = (*settings, "data.image_size=64", *untrained_teacher(tmp_path, "vit_tiny_patch16_224"))
    fit(tmp_path, NoWait(), *GPU, "epochs=1", f"compile={compile_mode}", f"data.render={render}", *settings)


def test_poll__is_asked_without_a_wait():
    """One process with NCCL; the first question starts the communicator."""
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        poll = Poll(torch.device("cuda", 0), 3)
        for numbers in ((0, 0, -1), (15, 1, -40)):
            poll.ask(numbers)
            torch.cuda.set_sync_debug_mode("error")
            assert poll.pending
            poll.ask(numbers)
            torch.cuda.set_sync_debug_mode("default")
            assert poll.answer() == list(numbers)
            assert not poll.pending
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.distributed.destroy_process_group()


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


def test_out_of_memory__one_sentence_with_the_memory_by_part(tmp_path, monkeypatch):
    """The process may use a fiftieth of the memory: less than a batch of 512 images takes."""
    monkeypatch.setenv("VITRAIL_LOGS", str(tmp_path))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    options = ("model=deit_small", "data.image_size=224", "data.batch_size=512", "compile=null", "data.num_workers=2")
    try:
        with pytest.raises(TrainingError, match=r"data\.batch_size=512: out of memory on cuda:0") as raised:
            train(compose("train", ["trainer=gpu", "epochs=1", *options]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    sentence = str(raised.value)
    assert "weights 0.08" in sentence
    assert "activations and the rest" in sentence
    assert sentence.endswith("(the same effective batch), or grad_checkpointing=true.")


def test_step_figures__of_a_gpu(tmp_path):
    """Device times, kernel launches and memory; a step's parts take most of the time that the host sees."""
    options = ["model=deit_small", "trainer=gpu", "data.batch_size=64", "mixing=mixup_cutmix"]
    training = MeasuredTraining(training_config([*options, "compile=null"]), tmp_path, 3, 10)
    training.run()
    figures = training.figures()
    assert all(seconds >= 0 for seconds in figures.parts.values())
    assert min(figures.parts[part] for part in ("forward", "backward", "optimizer", "average")) > 0
    assert figures.bare < 1.2 * figures.seconds
    assert figures.launches is None or figures.launches > 100  # None without the right to trace the device
    assert figures.peak_memory >= sum(figures.memory.values())
    assert figures.memory["activations"] > 10 * figures.memory["weights"]
    if peak_operations(torch.device("cuda"), "bf16-mixed"):
        assert 0 < figures.share_of_peak < 1


def test_tune__stays_within_the_memory_and_prints_a_command(tmp_path, capsys):
    options = ["tune=true", "model=vit_nano", "trainer=gpu", "warmup=1", "steps=2", "data.batch_size=64"]
    trials = tune(compose("benchmark_train", [*options, "compile=null", "largest=256", "memory=4"]))
    assert trials[0].figures.peak_memory <= 4 * 2**30
    assert "train.py" in capsys.readouterr().out
