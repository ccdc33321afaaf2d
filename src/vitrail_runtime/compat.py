"""All uses of private names of Lightning, Hydra and Optuna.

Each function has a test (`tests/runtime/test_compat.py`), so that a release that renames one is noticed at once.
Packages are imported where they are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

# Lightning: the position in a training. Its loops count it, but there is no public API for it.


def batches_seen(trainer: L.Trainer) -> int:
    """Return the number of batches that this training has started in all epochs, including those before resuming."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def completed_batches(trainer: L.Trainer) -> int:
    """Return the number of batches of the current epoch that have been started."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def is_last_batch(trainer: L.Trainer) -> bool:
    """Return whether the current batch is the last one of its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether the current batch is followed by another one before the optimiser steps."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def next_batch(trainer: L.Trainer) -> tuple[int, int]:
    """Return the epoch in which a training is about to start or resume, and the number of its finished batches."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    within = epochs.processed < epochs.ready
    if within and not batches.is_last_batch:
        return epochs.processed, batches.current.ready
    return epochs.processed + within, 0


def skip_batches(trainer: L.Trainer, count: int) -> None:
    """Count `count` more batches of the current epoch as finished; fewer if negative."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, getattr(progress, name) + count)


def reopen_train_loader(trainer: L.Trainer) -> None:
    """Start a new pass over the training loader, which Lightning opens before it knows where to resume."""
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def epochs_in_checkpoint(checkpoint: dict[str, Any]) -> int:
    """Return the number of finished epochs in a Lightning checkpoint."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def set_data_parallel_size(strategy: Any, size: int) -> None:
    """Let a ModelParallelStrategy shard over `size` processes, whose number it does not know when it is built."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = size, 1


def set_device(module: L.LightningModule, device: Any) -> None:
    """Tell a LightningModule its device, if it is not moved there as a whole."""
    module._device = device


def shares_batch_norm(trainer: L.Trainer) -> bool:
    """Return whether `trainer.sync_batchnorm` is set, for a strategy with several processes."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def share_batch_norm(strategy: Any, model: Any) -> None:
    """Let BatchNorm share its statistics, in place, if `trainer.sync_batchnorm` is set."""
    if strategy._layer_sync is not None:
        strategy._layer_sync.apply(model)


def ignore_lightnings_signals(trainer: L.Trainer) -> None:
    """Keep the training loop from telling all processes of SIGTERM at every batch, for which each waits."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def set_ddp_options(strategy: Any, **options: Any) -> None:
    """Set options of a DDP strategy that Lightning has chosen itself, unless they are set."""
    strategy._ddp_kwargs = options | strategy._ddp_kwargs


# Hydra


def hydra_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line with Hydra's parser, to get the flags that the jobs of a sweep need too."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_args(arguments)


@contextmanager
def target_check(check: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `check(name, None)` before Hydra resolves a `_target_`, and `check(name, object)` after it.

    Hydra has no hook for this, so the block replaces one of its functions.
    """
    from hydra._internal.instantiate import _instantiate2

    resolve = _instantiate2._resolve_target

    def checked(target: Any, full_key: str) -> Any:
        if isinstance(target, str):
            check(target, None)
            built = resolve(target, full_key)
            check(target, built)
            return built
        check(f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}", target)
        return resolve(target, full_key)

    _instantiate2._resolve_target = checked
    try:
        yield
    finally:
        _instantiate2._resolve_target = resolve


@contextmanager
def start_checks(
    check_logging: Callable[[Any], None], check_variables: Callable[[dict[str, str]], None]
) -> Iterator[None]:
    """Call the checks before Hydra applies a config's logging and environment variables.

    Hydra has no hook for this, so the block replaces two of its functions in the modules that `hydra.main` uses.
    """
    import hydra._internal.hydra
    import hydra.core.utils

    configure, override = hydra.core.utils.configure_log, hydra.core.utils.env_override

    def configure_checked(log_config: Any, verbose_config: Any = False) -> None:
        check_logging(log_config)
        configure(log_config, verbose_config)

    def override_checked(env: dict[str, str]) -> Any:
        check_variables(env)
        return override(env)

    hydra.core.utils.configure_log = hydra._internal.hydra.configure_log = configure_checked
    hydra.core.utils.env_override = override_checked
    try:
        yield
    finally:
        hydra.core.utils.configure_log = hydra._internal.hydra.configure_log = configure
        hydra.core.utils.env_override = override


# Optuna


def resumed_trial(study: Any, number: int) -> Any:
    """Return the trial of that number, which an earlier process started, to continue it; None if there is none.

    Optuna's public API returns only read-only copies of existing trials.
    """
    import optuna

    existing = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    return optuna.Trial(study, existing[number]._trial_id) if number in existing else None
