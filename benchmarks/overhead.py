"""Measure the framework's overhead: time per step of the Lightning loop divided by that of a bare PyTorch loop.

Both train the same backbone on the same batches, interleaved in one process, so that drift of the machine affects both
alike. The framework runs what `python src/train.py` runs: LightningModule, EMA, gradient check, speed monitor, logging,
progress bar and metrics in a CSV file. The bare loop runs forward pass, backward pass, AdamW, schedule and EMA.

Command: python benchmarks/overhead.py [--steps 40] [--rounds 5] [--batch 64] [--json FILE]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from figures import add_json, write_figures
from lightning.pytorch.callbacks import RichProgressBar
from timm.optim import create_optimizer_v2
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.sources import Digits
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.runs.loggers import MetricsCSV
from vitrail.training import EMA, CosineSchedule, ImageClassifier, NonfiniteGuard, OptimizerFactory, SpeedMonitor


class Fixed(ImageDataModule):
    """Data module with batches computed in advance, so that only the loops differ."""

    def __init__(self, steps: int, batch: int) -> None:
        super().__init__(Digits(), Augmentation(), image_size=32, batch_size=batch, num_workers=0)
        self.setup()
        self.batches = [made for made, _ in zip(super().train_dataloader(), range(steps), strict=False)]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the precomputed batches."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class Clock(L.Callback):
    """Callback that measures the seconds from the start of an epoch to the end of its last batch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Store the time since the start."""
        self.seconds = time.perf_counter() - self.started


def framework(model: torch.nn.Module, data: Fixed, folder: str) -> float:
    """Return the seconds for one epoch of the Trainer."""
    module = ImageClassifier(model, CrossEntropy(0.1), 10, OptimizerFactory(), CosineSchedule(per_step=True))
    clock, guard = Clock(), NonfiniteGuard(Path(folder) / "bad_step.pt", Path(folder) / "last.ckpt")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=20,
        logger=[MetricsCSV(Path(folder) / "metrics.csv")],
        callbacks=[EMA(0.999), guard, SpeedMonitor(), RichProgressBar(), clock],
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return clock.seconds


def bare(model: torch.nn.Module, data: Fixed) -> float:
    """Return the seconds for the same steps in a plain loop."""
    model.train()
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    scheduler = CosineSchedule(per_step=True).build(optimizer, 1, len(data.batches))
    started = time.perf_counter()
    for step, batch in enumerate(data.train_dataloader()):
        loss = F.cross_entropy(model(batch.image), batch.label, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        ema.update_parameters(model)
    return time.perf_counter() - started


def main() -> None:
    """Measure both loops alternately; print the ratio of each round and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one warm-up round")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    add_json(parser)
    args = parser.parse_args()
    data, ratios, steps = Fixed(args.steps, args.batch), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):
            torch.manual_seed(0)
            plain = bare(create_model("deit_nano", 10, 32), data)
            whole = framework(create_model("deit_nano", 10, 32), data, folder)
            if number:
                ratios.append(whole / plain)
                steps.append(1000 * plain / len(data.batches))
    print(
        f"bare loop: {statistics.median(steps):.1f} ms per step (batch {args.batch}, {torch.get_num_threads()} threads)"
    )
    print("framework / bare loop:", " ".join(f"{ratio:.3f}" for ratio in ratios))
    print(f"median {statistics.median(ratios):.3f}, minimum {min(ratios):.3f}, maximum {max(ratios):.3f}")
    write_figures(args.json, {"overhead": statistics.median(ratios), "bare_step_ms": statistics.median(steps)})


if __name__ == "__main__":
    main()
