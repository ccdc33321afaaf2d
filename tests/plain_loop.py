"""Batches, sizes and a callback for tests that compare a training with a plain loop."""

import lightning as L
import torch

from vitrail.types import Batch

EPOCHS, STEPS, BATCH, CLASSES, SIDE = 10, 3, 8, 5, 64
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}


class Batches(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size, random = BATCH, torch.Generator().manual_seed(0)
        self.content = [
            Batch(
                torch.randn(BATCH, 3, SIDE, SIDE, generator=random),
                torch.randint(0, CLASSES, (BATCH,), generator=random),
                [""] * BATCH,
            )
            for _ in range(STEPS)
        ]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.content, batch_size=None, shuffle=False)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())
