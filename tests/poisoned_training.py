"""Trainings of the digits in which one image makes a module return NaN."""

import lightning as L
import torch

from assembly import assemble
from vitrail.training import NonfiniteGuard

POISON = "digits/train/000007"


class Poison(L.Callback):
    """Callback that makes module `part` return NaN for batches with a certain image, and records every step.

    It records weights and learning rate after each step, and whether the batch contained the image.
    """

    def __init__(self, part, always=False):
        self.part, self.always, self.holds = part, always, False
        self.weights, self.rates, self.bad = [], [], []

    def on_fit_start(self, trainer, module):
        def spoil(_, __, output):
            return output * float("nan") if module.training and (self.holds or self.always) else output

        module.model.get_submodule(self.part).register_forward_hook(spoil)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.holds = POISON in batch.key

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([weight.detach().flatten().clone() for weight in module.model.parameters()]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.bad.append(self.holds)


def fit(folder, poison, *overrides, ckpt=None):
    common = (
        *("trainer=cpu", "callbacks.first_batch=null", "data.batch_size=32", "trainer.limit_val_batches=1", "epochs=2"),
        *("model=deit_nano", "data.image_size=16"),
    )
    trainer, module, data = assemble(folder, *common, *overrides)
    trainer.callbacks.append(poison)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    (guard,) = (callback for callback in trainer.callbacks if isinstance(callback, NonfiniteGuard))
    return trainer, guard
