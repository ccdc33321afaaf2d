"""Config groups set to null on the command line, such as `mixing=null`: Hydra deselects a group only by `~mixing`."""

from collections.abc import Iterable
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf

from vitrail_runtime.project import CONF


def without_null_groups(overrides: Iterable[str], program: str) -> list[str]:
    """Return the overrides with `group=null` as `~group`.

    Args:
        overrides: overrides as on the command line.
        program: name of the program's file in conf/.

    Raises:
        HydraException: the program needs this group; the message names the files to choose from.
    """
    return [_deselected(override, program) for override in overrides]


def _deselected(override: str, program: str) -> str:
    group, _, value = override.partition("=")
    if value != "null" or not (CONF / group).is_dir() or group not in (defaults := _defaults(program)):
        return override
    if defaults[group] is not None:
        files = ", ".join(sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml")))
        raise HydraException(f"{override}: {program} needs one of the files in conf/{group}: {files}.")
    return f"~{group}"


def _defaults(program: str) -> dict[str, str | None]:
    """Return the file that a program's config selects of each group; None for groups that may be left out."""
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{program}.yaml"))
    selected: dict[str, str | None] = {}
    for entry in config["defaults"]:
        if isinstance(entry, dict):
            selected |= {group.removeprefix("override "): file for group, file in entry.items()}
        elif entry != "_self_":  # the program's config extends another one
            selected |= _defaults(entry)
    return selected
