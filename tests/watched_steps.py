"""Callbacks for runs on several processes: one counts collectives, one spoils a gradient of one process."""

import json
from pathlib import Path

import lightning as L
import torch

from vitrail.runs import preemption
from waits import Waits


class Collectives(L.Callback):
    """Callback that counts the waits and collectives of steps 2 to 6, and writes them to a file `waits<rank>.json`."""

    def __init__(self, folder):
        self.folder, self.waits = Path(folder), Waits()

    def on_fit_start(self, trainer, module):
        preemption._SECONDS = 1e6  # ask for stop signals after the first step only

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            self.waits.__enter__()
        if batch_idx == 7:
            self.waits.__exit__(None, None, None)
            (self.folder / f"waits{trainer.global_rank}.json").write_text(json.dumps(self.waits.found))


class SpoiltGradient(L.Callback):
    """Callback that sets the first number of a gradient, on process `rank` in batch 2, before its reduction."""

    def __init__(self, rank, part, value=torch.nan):
        self.rank, self.part, self.value, self.batch = rank, part, float(value), 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch_idx

    def on_fit_start(self, trainer, module):
        def spoil(grad):
            if self.batch != 2:
                return grad
            return torch.cat([grad.new_full((1,), self.value), grad[1:]])

        def watch(part, _):
            if module.training and trainer.global_rank == self.rank and self.batch == 2:
                part.bias.register_hook(spoil)

        module.model.get_submodule(self.part).register_forward_pre_hook(watch)
