"""Measure the step of a training as `src/train.py` runs it, and a bare PyTorch loop of the same network beside it."""

import gc
import platform
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf

from vitrail.errors import ConfigError
from vitrail.objectives.contract import needs_of
from vitrail.runs.assembly import build_data, build_module, build_trainer, check_devices, model_name
from vitrail.runs.config import instantiate
from vitrail.runs.device import kernels, settle_auto
from vitrail.runs.directory import RunDirectory
from vitrail.runs.loggers import MetricsCSV
from vitrail.runs.synthetic import SyntheticData, synthetic_data
from vitrail.training.memory import StepMemory
from vitrail.training.peaks import operations_per_image, peak_operations
from vitrail.training.step_timer import StepTimer, moment, seconds_between
from vitrail.types import Batch

_LEFT_OUT = (
    *("checkpoint", "preemption", "first_batch", "label_maps", "predictions", "attention", "model_summary"),
    *("progress", "dashboard", "report"),
)
"""Callbacks that write, draw or print between the steps; all others are measured."""


class Figures(NamedTuple):
    """What was measured of one training; a step is one batch.

    Attributes:
        batch_size: images per step.
        parts: seconds per step by part, see `vitrail.training.step_timer.PARTS`: medians over the rounds.
        seconds: seconds per step in all: the median over the rounds.
        bare: seconds per step of the bare loop; None if it was not run.
        memory: bytes by part, see `vitrail.training.memory.StepMemory`.
        peak_memory: highest number of bytes at once.
        launches: kernels launched per step; None on a CPU.
        share_of_peak: share of the device's operations per second; None if its peak or the operations are unknown.
    """

    batch_size: int
    parts: dict[str, float]
    seconds: float
    bare: float | None
    memory: dict[str, int]
    peak_memory: int
    launches: int | None
    share_of_peak: float | None

    def named(self) -> dict[str, float]:
        """Return all known figures by name: times in ms, memory in MiB."""
        figures = {
            "images_per_second": self.batch_size / self.seconds,
            "share_of_peak": self.share_of_peak,
            "ms": 1e3 * self.seconds,
            **{f"{part}_ms": 1e3 * seconds for part, seconds in self.parts.items()},
            "kernel_launches": self.launches,
            "peak_mib": self.peak_memory / 2**20,
            **{f"{part}_mib": value / 2**20 for part, value in self.memory.items()},
        }
        if self.bare is not None:
            figures["bare_images_per_second"] = self.batch_size / self.bare
            figures["time_over_bare"] = self.seconds / self.bare
        return {name: float(f"{value:.6g}") for name, value in figures.items() if value is not None}


class _OneEpoch(L.Callback):
    """Callback that ends a training after its first epoch; the schedule is that of all epochs."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


class MeasuredTraining:
    """A training that is run for a few steps at a time.

    Args:
        config: config of the training; copied, then changed: one device, no files, no output.
        folder: folder for what the training writes.
        warmup: steps before the measured ones, in each round.
        steps: measured steps of a round.
        synthetic: train on batches made in advance, on the device, instead of the config's data.
        peak: operations per second of the device; None looks them up by the device's name.

    Raises:
        ConfigError: a setting is invalid, or the training cannot be measured.
    """

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        warmup: int,
        steps: int,
        synthetic: bool = True,
        peak: float | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder, self.peak = config.copy(), folder, peak
        accumulated = config.trainer.accumulate_grad_batches
        self.warmup, self.steps = (accumulated * -(-count // accumulated) for count in (warmup, steps))
        _restrict(self.config, folder, self._batches)
        self.data: Any = synthetic_data(self.config, self._batches) if synthetic else build_data(self.config)
        L.seed_everything(self.config.seed, workers=True, verbose=False)
        self.module = build_module(self.config, self.data)
        self._measured: list[tuple[dict[str, float], float | None]] = []
        self._memory: StepMemory | None = None
        self._operations: float | None = None
        on_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")

    @property
    def _batches(self) -> int:
        """Batches of a round: warm-up, measured steps, and those whose memory is measured."""
        return self.warmup + self.steps + 2 * self.config.trainer.accumulate_grad_batches

    @property
    def name(self) -> str:
        """Name of the backbone."""
        return model_name(self.config.model)

    @property
    def batch_size(self) -> int:
        """Images per step."""
        return int(self.data.batch_size)

    @property
    def uses_gpu(self) -> bool:
        """Whether the training runs on a GPU."""
        return self._device.type == "cuda"

    @property
    def device_name(self) -> str:
        """Name of the device."""
        return torch.cuda.get_device_name(self._device) if self.uses_gpu else platform.machine()

    @property
    def input(self) -> str:
        """Where the batches come from."""
        return "synthetic, on the device" if isinstance(self.data, SyntheticData) else type(self.data.source).__name__

    @property
    def description(self) -> str:
        """Main settings."""
        config, sides = self.config, "x".join(map(str, self.data.input.size))
        compiled = f"compiled: {config.compile}" if config.compile else "eager"
        checkpointed = ", checkpointed" if config.grad_checkpointing else ""
        settings = f"batch {self.batch_size}, {config.trainer.precision}, {compiled}{checkpointed}"
        return f"{self.name}, {sides}, {settings}, {self.input}"

    def shorten(self) -> None:
        """Measure as few steps as possible, for the memory alone."""
        self.warmup = self.steps = self.config.trainer.accumulate_grad_batches
        self.config.trainer.limit_train_batches = self._batches

    def run(self, bare: bool = True) -> None:
        """Run one round: the training, then the bare loop."""
        run = RunDirectory(self.folder)
        with kernels(self.config):
            trainer = build_trainer(self.config, run, self.data, MetricsCSV(self.folder / "metrics.csv"))
            timer, memory = StepTimer(self.warmup, self.steps), StepMemory(self.warmup + self.steps)
            timer.attach(trainer)
            trainer.callbacks += [memory, _OneEpoch()]  # type: ignore[attr-defined]
            trainer.fit(self.module, datamodule=self.data)
            self._device, self._memory = trainer.strategy.root_device, memory
            if self._operations is None:
                self._operations = operations_per_image(self.module, self.data.input.size) or 0
                self.peak = self.peak or peak_operations(self._device, str(trainer.precision))
            self._measured.append((timer.seconds(), self._bare_seconds(trainer, self._device) if bare else None))
        release()

    def _bare_seconds(self, trainer: L.Trainer, device: torch.device) -> float:
        """Return the seconds per step of a loop of network, cross-entropy and optimiser, on one batch on the device."""
        model, heads = self.module.model.to(device).train(), self.module.heads
        assert self.module.optimizer is not None
        optimizer = self.module.optimizer.build(model, self.batch_size)
        batch = self._one_batch(device)
        images = trainer.precision_plugin.convert_input(batch.image)
        for number in range(self.warmup + self.steps):
            if number == self.warmup:
                start = moment(device)
            with trainer.precision_plugin.forward_context():
                loss = F.cross_entropy(heads(model, images, None).merged(), batch.label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = seconds_between(start, moment(device)) / self.steps
        model.cpu()
        return seconds

    def _one_batch(self, device: torch.device) -> Batch:
        size, shape = self.batch_size, self.data.input.size
        label = torch.randint(self.data.num_classes, (size,), device=device)
        return Batch(torch.randn(size, 3, *shape, device=device), label, [""] * size)

    def figures(self) -> Figures:
        """Return what all rounds have measured."""
        assert self._memory is not None
        rounds = [parts for parts, _ in self._measured]
        bare = [seconds for _, seconds in self._measured if seconds is not None]
        seconds = statistics.median(sum(parts.values()) for parts in rounds)
        operations = (self._operations or 0) * self.batch_size / seconds
        return Figures(
            batch_size=self.batch_size,
            parts={part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]},
            seconds=seconds,
            bare=statistics.median(bare) if bare else None,
            memory=self._memory.parts,
            peak_memory=self._memory.peak,
            launches=self._memory.launches,
            share_of_peak=operations / self.peak if operations and self.peak else None,
        )


def _restrict(config: DictConfig, folder: Path, batches: int) -> None:
    """Let a training's config run a few steps on one device, without files and output, in place.

    Raises:
        ConfigError: the training is of a kind that cannot be measured.
    """
    for key in ("phases", "probe"):
        if config.get(key) is not None:
            raise ConfigError(f"{key}: only plain training with one image size can be measured; set {key}=null.")
    if "masks" in needs_of(instantiate(config.objective, "objective")):
        raise ConfigError("objective: only the training of classifiers can be measured, not of segmentation networks.")
    OmegaConf.set_struct(config, False)
    config.paths.run = str(folder)
    config.trainer.devices = config.trainer.num_nodes = 1
    check_devices(config.trainer)
    config.strategy = {"_target_": "builtins.str", "_args_": ["auto"]}  # as conf/strategy/auto.yaml
    config.logger = {}
    config.trainer.limit_train_batches = batches
    config.trainer.limit_val_batches = config.trainer.num_sanity_val_steps = 0
    for output in ("checkpointing", "progress_bar", "model_summary"):
        config.trainer[f"enable_{output}"] = False
    config.callbacks = {name: node for name, node in (config.callbacks or {}).items() if name not in _LEFT_OUT}
    settle_auto(config)


def release() -> None:
    """Return the memory of finished runs to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
