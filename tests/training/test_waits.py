"""Between two log points no step reads a value from the device, and none communicates but to reduce gradients."""

import lightning as L
import pytest
import torch

from assembly import assemble
from waits import Waits

pytestmark = pytest.mark.thorough

FIRST, LAST = 5, 55


class Watch(L.Callback):
    """Callback that counts waits from the start of batch `FIRST` to that of batch `LAST`."""

    def __init__(self, mode):
        self.mode = mode

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == FIRST:
            self.mode.__enter__()
        if batch_idx == LAST:
            self.mode.__exit__(None, None, None)


FUSED = ("optimizer=adamw", "optimizer.fused=true")  # other optimisers of the CPU read their own step counts
SETTINGS = {
    "mixup": ("model=deit_nano", "mixing=mixup_cutmix", *FUSED),
    "elements": ("model=deit_nano", "mixing=mixup_cutmix", "mixing.mode=elem", *FUSED),
    "mixtoken": ("model=deit_nano", "model.token_head=true", "objective=token_labeling", "mixing=mixtoken", *FUSED),
    "binary": ("model=deit_nano", "objective=binary_cross_entropy", *FUSED),
    "skip": ("model=timm", "model.name=resnet10t", "callbacks.nonfinite_guard.on_bad=skip", *FUSED),
    "clipping": ("model=vit_nano", "trainer.gradient_clip_val=1", "trainer.accumulate_grad_batches=2", *FUSED),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step__reads_nothing_from_the_device_in_50_steps(tmp_path, maps, settings):
    if "mixing=mixtoken" in settings:
        settings = (*settings, f"+data.label_maps={maps}")
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
    assert sum(waits.found.values()) == 3
