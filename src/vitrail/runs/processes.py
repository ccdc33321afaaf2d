"""Run a function in several processes, and report how they fail."""

from collections.abc import Callable
from typing import Any

from torch import multiprocessing

from vitrail.errors import ConfigError


def run_processes(function: Callable[..., None], args: tuple[Any, ...], count: int, poll: Callable[[], None]) -> None:
    """Run `function(number, *args)` in `count` new processes, and call `poll` twice a second.

    The processes end when this one dies.

    Raises:
        ConfigError: a process failed with a ConfigError or ImageError.
        RuntimeError: a process failed with another error, or was killed.
    """
    context = multiprocessing.start_processes(function, args, nprocs=count, join=False, start_method="spawn")
    assert context is not None
    try:
        while not context.join(timeout=0.5):
            poll()
        poll()
    except multiprocessing.ProcessRaisedException as error:
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        raise (ConfigError if kind.endswith(("ConfigError", "ImageError")) else RuntimeError)(message) from error
    except multiprocessing.ProcessExitedException as error:
        raise RuntimeError(f"a process died ({error}); run the same command again to continue") from error
