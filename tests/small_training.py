"""A small network on the embedded digits, for runs of a few steps in the test's own process."""

import lightning as L
import torch

from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.sources import Digits
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.training import ImageClassifier


def build(mixing=None, **kwargs):
    """Return a module with a network of two blocks, and data with batches of 16 images."""
    torch.manual_seed(0)
    model = create_model("deit_nano", 10, 8, depth=2)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    data = ImageDataModule(Digits(), augment=Augmentation(), image_size=8, batch_size=16, num_workers=0)
    return ImageClassifier(model, CrossEntropy(0.1), 10, mixing=mixing, **kwargs), data


def trainer(tmp_path, callbacks=(), **kwargs):
    """Return a silent trainer on the CPU that writes no files by itself."""
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        default_root_dir=tmp_path, callbacks=list(callbacks), **kwargs,
    )  # fmt: skip
