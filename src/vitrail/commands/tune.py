"""`tune=true`: find the largest batch that fits, and the fastest settings of a training, on one device."""

import itertools
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box, get_console

from vitrail.errors import ConfigError
from vitrail.runs.keys import check_keys
from vitrail.runs.logs import set_up_logging
from vitrail.runs.measured_config import compared, training_config, training_overrides, uses_synthetic
from vitrail.runs.measuring import Figures, MeasuredTraining, release
from vitrail.training.classifier import has_overlapping_convolutions
from vitrail.training.memory import is_out_of_memory
from vitrail_runtime.invocation import options, shown_command
from vitrail_runtime.tables import PlainTable

_RETRIES = 4  # at smaller batch sizes, if a setting needs more memory than the eager training

Settings = dict[str, Any]
"""Values of a training's config, by their dotted keys."""


class Trial(NamedTuple):
    """Settings that were tried, with their batch size, and what was measured; None if no batch fits."""

    settings: Settings
    figures: Figures | None

    @property
    def overrides(self) -> list[str]:
        """The settings as overrides."""
        return [f"{key}={'null' if value is None else str(value).lower()}" for key, value in self.settings.items()]

    @property
    def speed(self) -> float:
        """Images per second; 0 if no batch fits."""
        return 0.0 if self.figures is None else self.figures.batch_size / self.figures.seconds


class Tuner:
    """Tries settings of the training that the command line describes.

    Args:
        config: config of the benchmark.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.overrides = config, training_overrides()
        self.training, self.synthetic = training_config(self.overrides), uses_synthetic(config, self.overrides)
        with tempfile.TemporaryDirectory() as folder:
            first = self.build({}, folder)
            can_checkpoint = self._can_checkpoint(folder)
        self.batch_size, self.on_gpu = first.batch_size, first.uses_gpu
        self.choices: dict[str, list[Any]] = {
            "compile": [None, *([first.config.compile] if first.config.compile else [])],
            "grad_checkpointing": [False, *([True] if can_checkpoint else [])],
            "kernels.channels_last": [False, True] if has_overlapping_convolutions(first.module.model) else [],
        }
        for override in self.overrides:
            self.choices.pop(override.partition("=")[0].lstrip("+~"), None)  # the command line has chosen

    def build(self, settings: Settings, folder: str) -> MeasuredTraining:
        """Build the training with other settings."""
        training, config = self.training.copy(), self.config
        for key, value in settings.items():
            OmegaConf.update(training, key, value)
        return MeasuredTraining(training, Path(folder), config.warmup, config.steps, self.synthetic, config.peak)

    def _can_checkpoint(self, folder: str) -> bool:
        try:
            self.build({"grad_checkpointing": True}, folder)
        except ConfigError as error:
            if not str(error).startswith("grad_checkpointing"):
                raise
            return False
        return True

    def settings(self) -> list[Settings]:
        """Return all combinations of settings."""
        pairs = [[(key, value) for value in values] for key, values in self.choices.items() if values]
        return [dict(chosen) for chosen in itertools.product(*pairs)]

    def run(self, settings: Settings, is_short: bool = False) -> Figures | None:
        """Measure a training; None if it does not fit.

        Args:
            settings: settings, with `data.batch_size`.
            is_short: measure the memory only, by a few steps.
        """
        torch.compiler.reset()  # networks that were compiled before count towards its limit
        try:
            with tempfile.TemporaryDirectory() as folder:
                training = self.build(settings, folder)
                if is_short:
                    training.shorten()
                training.run(bare=False)
                figures = training.figures()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return figures if figures.peak_memory <= self.limit else None
        release()  # only here the traceback is gone, and with it the tensors
        return None

    @property
    def limit(self) -> float:
        """Bytes that a step may take."""
        if self.config.memory is not None:
            return self.config.memory * 2**30
        return float("inf") if self.on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4

    def tune(self) -> list[Trial]:
        """Try all settings, each with its largest batch; return the trials, the fastest first.

        The largest batch is looked for without compilation, which would take minutes for each size.
        """
        largest: dict[Any, int] = {}
        trials = []
        for settings in self.settings():
            checkpointed = settings.get("grad_checkpointing")
            if checkpointed not in largest:
                eager = settings | ({"compile": None} if "compile" in settings else {})
                largest[checkpointed] = largest_batch(
                    lambda size, eager=eager: self.run({**eager, "data.batch_size": size}, is_short=True) is not None,  # type: ignore[misc]
                    self.batch_size,
                    self.config.largest,
                )
            trials.append(self._timed(settings, largest[checkpointed]))
        return sorted(trials, key=lambda trial: trial.speed, reverse=True)

    def _timed(self, settings: Settings, batch_size: int) -> Trial:
        """Measure settings at a batch size, or at a smaller one if they need more memory."""
        for _ in range(_RETRIES):
            chosen = {**settings, "data.batch_size": batch_size}
            if batch_size and (figures := self.run(chosen)) is not None:
                return Trial(chosen, figures)
            batch_size = _round(7 * batch_size // 8)
        return Trial(settings, None)


def largest_batch(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """Return the largest batch size that fits, to an eighth; 0 if none does.

    Args:
        fits: whether a batch size fits.
        start: batch size to try first; it is doubled or halved, then the interval is bisected.
        limit: largest batch size to try.
    """
    limit = max(1, _round(limit))
    size = min(start, limit)
    if fits(size):
        low = size
        while low < limit and fits(min(2 * low, limit)):
            low = min(2 * low, limit)
        if low == limit:
            return low
        high = min(2 * low, limit)
    else:
        low, high = _round(size // 2), size
        while low and not fits(low):
            low, high = _round(low // 2), low
    while low and (middle := _round((low + high) // 2)) - low >= max(1, low // 8):
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _round(size: int) -> int:
    """Round a batch size down to a multiple of 8, small ones to an even number, which mixing needs."""
    return size // 8 * 8 if size >= 16 else size // 2 * 2


def tune(config: DictConfig) -> list[Trial]:
    """Try the settings of the training that the command line describes; print a table and the best one's command.

    Returns:
        The trials, the fastest one first.

    Raises:
        ConfigError: a setting is invalid, or no batch size fits.
    """
    set_up_logging()
    check_keys(config, "benchmark_train")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tuner = Tuner(config)
    trials = tuner.tune()
    best = trials[0]
    if best.figures is None:
        raise ConfigError(f"data.batch_size={tuner.batch_size}: no batch size fits into memory with any setting.")
    get_console().print(_table(trials))
    arguments = shlex.join([*options(), *compared(tuner.overrides, best.overrides)])
    get_console().print(f"{shown_command('train')} {arguments}", soft_wrap=True, markup=False, highlight=False)
    if config.json is not None:
        figures = {"batch_size": best.figures.batch_size, **best.figures.named()}
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return trials


def _table(trials: Sequence[Trial]) -> PlainTable:
    """Return a table of the trials, the fastest one first."""
    keys = [key for key in trials[0].settings if key != "data.batch_size"]
    title = "fastest settings first, each with the largest batch that fits"
    table = PlainTable(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in (*(key.rpartition(".")[2] for key in keys), "batch", "images/s", "ms", "peak MiB", "of peak"):
        table.add_column(column, justify="right")
    for trial in trials:
        figures, row = trial.figures, [str(trial.settings[key]) for key in keys]
        if figures is None:
            table.add_row(*row, "none fits", "", "", "", "")
            continue
        share = "" if figures.share_of_peak is None else f"{100 * figures.share_of_peak:.1f} %"
        speed, time = f"{trial.speed:,.1f}", f"{1e3 * figures.seconds:.2f}"
        table.add_row(*row, str(figures.batch_size), speed, time, f"{figures.peak_memory / 2**20:,.0f}", share)
    table.caption = "a larger batch changes the effective batch size, and by optimizer.lr_scaling the learning rate"
    return table
