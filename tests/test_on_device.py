"""Trainings and label maps on the device of VITRAIL_TEST_DEVICE: a GPU in `make test-gpu`, otherwise the CPU."""

import os

import numpy as np
import pytest
import torch

from assembly import assemble
from programs import QUICK, metrics, run, train
from resuming import RANDOM_DRAWS, resume_after_kills
from vitrail.data.label_maps import LabelMapStore
from vitrail.models import forward_heads
from vitrail.objectives import CrossEntropy
from vitrail.training import EMA
from vitrail.types import Targets

DEVICE = torch.device(os.environ.get("VITRAIL_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
TRAINER = "trainer=gpu" if ON_GPU else "trainer=cpu"
EAGER = (TRAINER, "compile=null", "trainer.precision=32-true", "kernels.tf32=false")
long = pytest.mark.thorough if ON_GPU else pytest.mark.slow  # other tests of the default suite do the same on a CPU
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("options", [("model=deit_nano",), ("model=lvvit_nano",), ("model=t2t_vit", "+model.depth=2")])
def test_bf16__logits_and_losses_equal_those_of_fp32(options, tmp_path):
    """bf16 keeps 8 bits of a number: logits differ by a few per cent of their spread."""
    name = ("model.name=t2t_vit_7",) if "model=t2t_vit" in options else ()
    _, module, _ = assemble(tmp_path, *EAGER, *options, *name, "data.image_size=64")
    model, objective = module.model.to(DEVICE).eval(), CrossEntropy(0.1)
    torch.nn.init.normal_(model.get_classifier().weight, std=0.1)
    images, labels = torch.randn(32, 3, 64, 64, device=DEVICE), torch.arange(32, device=DEVICE) % 10
    logits, losses = {}, {}
    for precise in (True, False):
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=not precise):
            outputs = forward_heads(model, images)
            losses[precise] = float(objective(outputs, Targets(labels))["loss"])
        logits[precise] = outputs.cls.float()
    assert logits[False].dtype == torch.float32
    assert not torch.equal(logits[False], logits[True])
    assert (logits[False] - logits[True]).abs().max() < 0.05 * logits[True].std()
    assert losses[False] == pytest.approx(losses[True], rel=0.01)


@long
def test_training__reaches_an_accuracy(tmp_path):
    """Compiled and in bf16 on a GPU."""
    epochs, accuracy = (20, 90) if ON_GPU else (4, 30)
    options = (f"epochs={epochs}", "schedule.warmup_epochs=1", "callbacks.model_summary=null")
    directory = train(TRAINER, *options, logs=tmp_path)
    assert metrics(directory)[-1]["val/top1"] > accuracy


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Metrics of a training of one process without a process group."""
    logs = tmp_path_factory.mktemp("single")
    return metrics(train(*EAGER, *QUICK[1:], "model=deit_nano", "data.batch_size=32", logs=logs))[0]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("fsdp",), marks=long),
        pytest.param(("fsdp", "strategy.offload=true"), marks=long),
        ("ddp",),
    ],
    ids=" ".join,
)
def test_process_group__of_one_process_changes_nothing(options, single, tmp_path):
    """FSDP2 and DDP with NCCL on a GPU, with gloo on the CPU."""
    trainer = options[0] if ON_GPU else f"{options[0]}_cpu_2"
    common = (*EAGER[1:], *QUICK[1:], "model=deit_nano", "data.batch_size=32", "trainer.devices=1")
    found = metrics(train(f"trainer={trainer}", *options[1:], *common, logs=tmp_path))[0]
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/loss_ema"):
        assert found[name] == pytest.approx(single[name], rel=1e-3), name


@long
def test_resume__with_deterministic_kernels_is_exact(image_tree, tmp_path):
    """Rendered in the loader: a refused operation would be one of the network or of the loss."""
    exact = ("trainer.deterministic=true", "trainer.benchmark=false", "data.render=loader", "data.num_workers=1")
    options = tuple(TRAINER if option == "trainer=cpu" else option for option in RANDOM_DRAWS)
    resume_after_kills(*options, *exact, f"data.root={image_tree}", folder=tmp_path, steps=(5,))


def test_ema__on_the_cpu_equals_that_on_the_device(tmp_path):
    options = (*EAGER, "epochs=1", "trainer.limit_train_batches=10", "trainer.limit_val_batches=1")
    trainer, module, data = assemble(tmp_path, *options, "model=vit_nano", "callbacks.ema.decay=0.9")
    on_cpu = EMA(0.9, device="cpu")
    trainer.callbacks.append(on_cpu)
    trainer.fit(module, datamodule=data)
    (on_device,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA) and callback is not on_cpu)
    assert on_device.updates == on_cpu.updates == 10
    for name, tensor in on_cpu.average.items():
        assert tensor.device.type == "cpu"
        assert on_device.average[name].device.type == DEVICE.type
        torch.testing.assert_close(on_device.average[name].cpu(), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.thorough
def test_annotate__maps_of_the_device_equal_those_of_the_cpu(image_tree, tmp_path):
    options = ("data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.batch_size=4")
    network = ("model=deit_nano", "compile=null", "data.num_workers=0")
    directory = train(TRAINER, *QUICK[1:], *options, *network, logs=tmp_path)
    stores = {}
    for device in ("cpu", DEVICE.type):
        out = tmp_path / f"maps_{device}_{len(stores)}"
        chosen = ("annotator=run", f"annotator.ckpt={directory}", *options[:2], f"device={device}", f"out={out}")
        result = run("annotate.py", *chosen, "num_workers=0", "top_k=2", logs=tmp_path)
        assert result.returncode == 0, result.stderr
        stores[out.name] = LabelMapStore.open(out)
    first, second = stores.values()
    assert len(first) == len(second) == 16
    for index in range(16):
        (scores, classes), (others, other_classes) = first[index], second[index]
        order, other_order = np.argsort(classes, 0), np.argsort(other_classes, 0)
        sorted_scores = np.take_along_axis(scores, order, 0).astype(np.float32)
        np.testing.assert_allclose(
            sorted_scores, np.take_along_axis(others, other_order, 0).astype(np.float32), atol=0.05
        )
