"""Between two log points no step reads a value from the device, and none communicates but to reduce gradients."""

import lightning as L
import numpy as np
import pytest
import torch

from assembly import assemble
from untrained_teacher import untrained_teacher
from vitrail.data.transfer import to_device
from waits import Waits

pytestmark = pytest.mark.thorough

FIRST, LAST = 5, 55


class Watch(L.Callback):
    """Callback that counts waits from the start of batch `FIRST` to that of batch `LAST`."""

    def __init__(self, mode):
        self.mode = mode

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == FIRST:
            for state in trainer.optimizers[0].state.values():
                if "step" in state and not trainer.optimizers[0].param_groups[0].get("fused"):
                    state["step"].is_of_host = True  # the host's step count of an optimiser that is not fused
            self.mode.__enter__()
        if batch_idx == LAST:
            self.mode.__exit__(None, None, None)


SIDE = "data.image_size=64"
FUSED = ("optimizer=adamw", "optimizer.fused=true")  # other optimisers of the CPU read their own step counts
SETTINGS = {
    "mixup": ("model=deit_nano", "mixing=mixup_cutmix", *FUSED),
    "elements": ("model=deit_nano", "mixing=mixup_cutmix", "mixing.mode=elem", *FUSED),
    "mixtoken": ("model=deit_nano", "model.token_head=true", "objective=token_labeling", "mixing=mixtoken", *FUSED),
    "binary": ("model=deit_nano", "objective=binary_cross_entropy", *FUSED),
    "skip": ("model=timm", "model.name=resnet10t", "callbacks.nonfinite_guard.on_bad=skip", *FUSED),
    "clipping": ("model=vit_nano", "trainer.gradient_clip_val=1", "trainer.accumulate_grad_batches=2", *FUSED),
    "lamb": ("model=vit_nano", "optimizer=lamb", "optimizer.fused=true"),
    "muon": ("model=vit_nano", "optimizer=muon"),
    "agc": ("model=deit_nano", "callbacks.adaptive_clip.factor=0.01", *FUSED),
    "distillation": ("model=deit_nano", "model.name=deit_nano_distilled", "objective=distillation", *FUSED),
    "features": ("model=deit_nano", "objective=feature_distillation", *FUSED),
    "dynamicvit": ("model=dynamicvit", "model.name=dynamicvit_deit_tiny", "objective=dynamicvit", SIDE, *FUSED),
    "evo_vit": ("model=evo_vit", "model.name=evo_deit_tiny_patch16_224", "objective=evo_vit", SIDE, *FUSED),
}
TEACHERS = {"distillation": "deit_nano", "features": "vit_nano", "dynamicvit": "vit_tiny_patch16_224"}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.sample(3)
def test_step__reads_nothing_from_the_device_in_50_steps(tmp_path, maps, name):
    settings = SETTINGS[name]
    if "mixing=mixtoken" in settings:
        settings = (*settings, f"+data.label_maps={maps}")
    if name in TEACHERS:
        settings = (*settings, *untrained_teacher(tmp_path, TEACHERS[name]))
    # One worker: the draws of augmentation are read by the loader's process.
    trainer, module, data = assemble(
        tmp_path, "trainer=cpu", "epochs=1", "data.batch_size=4", "data.num_workers=1", "data.image_size=32",
        "trainer.limit_train_batches=60", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1000", *settings,
    )  # fmt: skip
    waits = Waits()
    trainer.callbacks.append(Watch(waits))
    trainer.fit(module, datamodule=data)
    assert not waits.found


def test_validation__reads_nothing_from_the_device(tmp_path):
    trainer, module, data = assemble(
        tmp_path, "trainer=cpu", "epochs=1", "data.batch_size=32", "trainer.limit_train_batches=1", "data.num_workers=0"
    )
    waits = Waits()

    class Watch(L.Callback):
        def on_validation_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                waits.__enter__()

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                waits.__exit__(None, None, None)

    trainer.callbacks.append(Watch())
    trainer.fit(module, datamodule=data)
    assert not waits.found


def test_waits__are_counted():
    values = torch.ones(3)
    with Waits() as waits:
        assert values.sum().item() == 3
        assert values.sum() > 0
        values[values > 0]
        values.cpu(), values.tolist(), values.numpy(), values.to("cpu")
    assert sum(waits.found.values()) == 7


def test_waits__tensors_of_the_host_are_counted_when_they_are_copied():
    values, device = torch.ones(3), torch.device("cpu")
    with Waits() as waits:
        torch.tensor([1, 2]).tolist()
        to_device(torch.from_numpy(np.ones(3, np.float32)), device) + values
        values[:, None].to(device, torch.float64)
    assert not waits.found
    with Waits() as waits:
        torch.tensor([1, 2], device=device)
        torch.from_numpy(np.ones(3)).to(device)
        to_device(torch.tensor([1, 2]), device).tolist()
        values[[0, 2]]
        values[torch.tensor([0, 2])]
        values.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert sum(waits.found.values()) == 6
