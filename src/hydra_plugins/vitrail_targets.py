"""What a config may build: `_target_` names code to be called, so a YAML from somebody else must not name just any.

Every `_target_`, of vitrail's own configs and of Hydra's callbacks, passes here before it is resolved, and what it
resolved to passes again, by where that was defined: `vitrail.run.directory.subprocess.run` is Python's, not ours.
`VITRAIL_TARGETS`, in the environment or `.env` and so not in a config's hands, allows more: packages, modules, or
single names, separated by commas.

Hydra's own part of a config names code in its logging, too, and can set variables of the environment.
"""

import os
from typing import Any

import hydra._internal.hydra
import hydra.core.utils
from hydra._internal.instantiate import _instantiate2
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

# Whatever lies below these names may be built; functions only where they are vitrail's.
_ALLOWED = (
    *(f"vitrail.{room}" for room in ("data", "models", "objectives", "training", "insight")),
    *(f"vitrail.run.{module}" for module in ("annotation", "loggers", "preservation")),
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

# What Hydra's logging may name: it prints, and writes files.
_LOGGING = (
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"),
    *("logging.handlers.RotatingFileHandler", "rich.logging.RichHandler", "colorlog.ColoredFormatter"),
    *("ext://sys.stdout", "ext://sys.stderr"),
)


def allowed() -> tuple[str, ...]:
    """Names below which everything may be built."""
    return (*_ALLOWED, *(name.strip() for name in os.environ.get("VITRAIL_TARGETS", "").split(",") if name.strip()))


def check_target(target: str, built: Any = None) -> None:
    """Refuse a name, and what it resolved to, that are not below an allowed one.

    Raises:
        HydraException: says which, and how to allow it.
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
                f"_target_: {what} is none of the packages that a config may build from; if you trust it, set"
                f" VITRAIL_TARGETS={name.rpartition('.')[0]} in the environment or .env."
            )
    is_function = built is not None and not isinstance(built, type)
    if is_function and not names[-1].startswith("vitrail.") and all(root in _ALLOWED for root in below):
        raise HydraException(f"_target_: {target} is a function; of other packages a config may build classes only.")


def check_logging(tree: Any) -> None:
    """Refuse code in a logging config, which Python's logging would import and call, but for what prints and writes.

    Raises:
        HydraException: says which.
    """
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        names_code = key in ("class", "()") or (isinstance(value, str) and "://" in value)
        if names_code and value not in _LOGGING:
            raise HydraException(f"hydra.job_logging, hydra.hydra_logging: {value} is none of {', '.join(_LOGGING)}.")
        check_logging(value)


def _guard() -> None:
    """Put the checks before and behind the places where Hydra turns a name into code, and sets variables."""
    configure, override = hydra.core.utils.configure_log, hydra.core.utils.env_override

    def configure_checked(log_config: DictConfig, verbose_config: Any = False) -> None:
        if log_config is not None:
            check_logging(OmegaConf.to_container(log_config, resolve=True))
        configure(log_config, verbose_config)

    def override_checked(env: dict[str, str]) -> Any:
        if env:
            raise HydraException(f"hydra.job.env_set.{next(iter(env))}: a config sets no variables; set it in .env.")
        return override(env)

    hydra.core.utils.configure_log = hydra._internal.hydra.configure_log = configure_checked
    hydra.core.utils.env_override = override_checked
    resolve = _instantiate2._resolve_target

    def checked(target: Any, full_key: str) -> Any:
        if isinstance(target, str):
            check_target(target)
            built = resolve(target, full_key)
            check_target(target, built)
            return built
        check_target(f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}", target)
        return resolve(target, full_key)

    _instantiate2._resolve_target = checked


if not getattr(_instantiate2, "_vitrail_guard", False):  # Hydra imports its plugins more than once
    _guard()
    _instantiate2._vitrail_guard = True
