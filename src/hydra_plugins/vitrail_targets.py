"""What a config may build: `_target_` names code to be called, so a YAML from somebody else must not name just any.

Every `_target_`, of vitrail's own configs and of Hydra's callbacks, passes here before it is resolved, and what it
resolved to passes again, by where that was defined: `vitrail.run.directory.subprocess.run` is Python's, not ours.
`VITRAIL_TARGETS`, in the environment or `.env` and so not in a config's hands, allows more: packages, modules, or
single names, separated by commas.
"""

import os
from typing import Any

from hydra._internal.instantiate import _instantiate2

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


def allowed() -> tuple[str, ...]:
    """Names below which everything may be built."""
    return (*_ALLOWED, *(name.strip() for name in os.environ.get("VITRAIL_TARGETS", "").split(",") if name.strip()))


def check_target(target: str, built: Any = None) -> None:
    """Refuse a name, and what it resolved to, that are not below an allowed one.

    Raises:
        ValueError: says which, and how to allow it.
    """
    names = [target]
    if built is not None:
        module, name = getattr(built, "__module__", None), getattr(built, "__qualname__", None)
        names.append(f"{module}.{name}")
    for name in names:
        below = [root for root in allowed() if name == root or name.startswith(f"{root}.")]
        if not below:
            what = target if name == target else f"{target}, which is {name},"
            raise ValueError(
                f"_target_: {what} is none of the packages that a config may build from; if you trust it, set"
                f" VITRAIL_TARGETS={name.rpartition('.')[0]} in the environment or .env."
            )
    is_function = built is not None and not isinstance(built, type)
    if is_function and not names[-1].startswith("vitrail.") and all(root in _ALLOWED for root in below):
        raise ValueError(f"_target_: {target} is a function; of other packages a config may build classes only.")


def _guard() -> None:
    """Put the check before and behind the place where Hydra turns a name into code."""
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
