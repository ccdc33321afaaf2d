"""Restrict what a config may build: a `_target_` in somebody else's YAML must not be able to call arbitrary code.

Every `_target_` is checked before it is resolved. The resolved object is then checked by the module that defines it:
`vitrail.runs.directory.subprocess.run`, for example, is Python's function, not vitrail's. `VITRAIL_TARGETS` (in the
environment or `.env`) and `--allow` (on the command line) allow more packages, modules or single names, separated by
commas. No config can set them.

Hydra's own part of a config can also name code, in its logging, and set environment variables; both are checked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf

from vitrail_runtime.compat import start_checks, target_check

# Everything below these names may be built; functions only if they are vitrail's.
_ALLOWED = (
    *(f"vitrail.{room}" for room in ("checkpoints", "data", "models", "objectives", "training", "reporting")),
    *(f"vitrail.runs.{module}" for module in ("loggers", "preemption", "trained", "wandb_logger")),
    "vitrail_runtime.sweep_report",
    *(
        "hydra_plugins.vitrail_launchers",
        "hydra_plugins.vitrail_sweeps",
        "hydra._internal.core_plugins",
        "lightning.Trainer",
        "builtins.str",
    ),
    *(
        f"lightning.pytorch.{part}"
        for part in ("trainer", "callbacks", "strategies", "loggers", "plugins", "profilers")
    ),
    *("lightning.fabric.plugins", "torch.nn", "torch.optim", "torchmetrics"),
    *("timm.layers", "timm.loss", "timm.optim", "timm.scheduler"),
)

# What Hydra's logging config may name: classes that print or write files.
_LOGGING = (
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"),
    *("logging.handlers.RotatingFileHandler", "rich.logging.RichHandler", "colorlog.ColoredFormatter"),
    *("ext://sys.stdout", "ext://sys.stderr"),
)


def allow(names: str) -> None:
    """Allow more names, separated by commas, for this process and its child processes."""
    os.environ["VITRAIL_TARGETS"] = ",".join(filter(None, (os.environ.get("VITRAIL_TARGETS", ""), names)))


def allowed() -> tuple[str, ...]:
    """Return the names below which everything may be built."""
    return (*_ALLOWED, *(name.strip() for name in os.environ.get("VITRAIL_TARGETS", "").split(",") if name.strip()))


def check_target(target: str, built: Any = None) -> None:
    """Check that a name, and the object that it resolved to, lie below an allowed name.

    Raises:
        HydraException: they do not; the message says how to allow them.
    """
    names = [target]
    if built is not None:
        module, name = getattr(built, "__module__", None), getattr(built, "__qualname__", None)
        names.append(f"{module}.{name}")
    for name in names:
        below = [root for root in allowed() if name == root or name.startswith(f"{root}.")]
        if not below:
            what = target if name == target else f"{target}, which is {name},"
            raise HydraException(
                f"_target_: {what} is not in a package that a config may build from; if you trust it, add"
                f" --allow {name.rpartition('.')[0]}, or set VITRAIL_TARGETS to it in the environment or .env."
            )
    is_function = built is not None and not isinstance(built, type)
    if is_function and not names[-1].startswith("vitrail.") and all(root in _ALLOWED for root in below):
        raise HydraException(f"_target_: {target} is a function; from other packages a config may build classes only.")


def resolve_target(target: str) -> Any:
    """Return the object that a `_target_` names; the name is checked before anything is imported.

    Raises:
        HydraException: the name is not allowed, or there is no such object.
    """
    check_target(target)
    try:
        found = get_object(target)
    except (ImportError, ValueError) as error:
        raise HydraException(f"_target_: {target} cannot be imported ({str(error).splitlines()[0]}).") from error
    check_target(target, found)
    return found


def check_logging(tree: Any) -> None:
    """Check that a logging config names only the allowed classes: Python's logging imports and calls any name in it.

    Raises:
        HydraException: a name is not allowed.
    """
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        names_code = key in ("class", "()") or (isinstance(value, str) and "://" in value)
        if names_code and value not in _LOGGING:
            raise HydraException(
                f"hydra.job_logging, hydra.hydra_logging: {value} is not allowed; choose from {', '.join(_LOGGING)}."
            )
        check_logging(value)


@contextmanager
def guarded() -> Iterator[None]:
    """Check every `_target_`, logging config and environment variable that Hydra handles within the block.

    Only vitrail's programs and `vitrail.runs.config.instantiate` use such a block, so other Hydra programs in the same
    environment are not affected.
    """
    with target_check(check_target), start_checks(_check_log_config, _check_variables):
        yield


def _check_log_config(log_config: Any) -> None:
    if log_config is not None:
        check_logging(OmegaConf.to_container(log_config, resolve=True))


def _check_variables(env: dict[str, str]) -> None:
    if env:
        raise HydraException(
            f"hydra.job.env_set.{next(iter(env))}: configs cannot set environment variables; set it in .env."
        )
