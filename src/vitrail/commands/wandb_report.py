"""Write a W&B report: `python src/report.py wandb=<entity/project>`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import get_console

from vitrail.errors import ConfigError
from vitrail.reporting.wandb_report import ProjectPath, write_report
from vitrail.runs.logs import set_up_logging
from vitrail.runs.wandb_logger import wandb_mode
from vitrail_runtime.project import CONF

log = logging.getLogger(__name__)


def wandb_report(config: DictConfig) -> str:
    """Write the report that `config` describes, print its address and return it.

    `wandb` is a project or a sweep; `runs` are ids or names of runs, or run directories; `sweep`
    is the id of a sweep of W&B's.

    Raises:
        ConfigError: a setting is invalid, there are no such runs, or the server cannot be used.
    """
    set_up_logging()
    where = ProjectPath.parse(str(config.wandb))
    if sweep := _sweep(config):
        where = where._replace(sweep=sweep)
    mode, reason = wandb_mode()
    if mode != "online":
        raise ConfigError(f"wandb={config.wandb}: needs W&B's server, but {reason or f'WANDB_MODE={mode} is set'}.")
    runs = None if OmegaConf.is_missing(config, "runs") else config.get("runs")
    address = write_report(where, _runs(runs), config.get("metric"))
    get_console().print(f"report: {address}", soft_wrap=True, markup=False, highlight=False)
    return address


def _sweep(config: DictConfig) -> str | None:
    """Return the id of a W&B sweep; conf/sweep/ is a config group too, and its files are none."""
    named = config.get("sweep")
    if named is None and HydraConfig.initialized():
        named = HydraConfig.get().runtime.choices.get("sweep")
        if named is not None and (CONF / "sweep" / f"{named}.yaml").is_file():
            named = None
    return None if named is None else str(named)


def _runs(given: str | Sequence[str] | None) -> list[str]:
    """Return the ids or names of runs; a run directory stands for the W&B run that it belongs to.

    Raises:
        ConfigError: a directory is no run with logger=wandb.
    """
    if given is None:
        return []
    names = []
    for name in given.split(",") if isinstance(given, str) else map(str, given):
        folder = Path(name).expanduser()
        identity = folder / "wandb_id.txt"
        if folder.is_dir() and not identity.is_file():
            raise ConfigError(f"runs={name}: not a run directory with logger=wandb (no wandb_id.txt).")
        names.append(identity.read_text().strip() if folder.is_dir() else name.strip())
    return names
