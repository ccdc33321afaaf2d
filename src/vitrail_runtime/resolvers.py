"""Resolvers that configs use as `${vitrail.name:...}`."""

import os
import secrets
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vitrail_runtime.project import home


@cache
def _stamp() -> str:
    """Return the name of this job's directory, the same in all of its processes; names sort by start time.

    Each process composes its own config and may be restarted, and all have to find the same name. The name is therefore
    SLURM's or torchrun's id if there is one. Otherwise it is the time in microseconds and two random digits.
    """
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return f"slurm_{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"  # unchanged when SLURM requeues
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id and run_id != "none":  # torchrun's --rdzv-id, or its random id for one machine
        return f"torchrun_{run_id}"
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}-{secrets.token_hex(1)}"
    return _agree(stamp) if run_id else stamp


def renew() -> None:
    """Let the next job of this process have a directory of its own."""
    _stamp.cache_clear()


def _agree(stamp: str) -> str:
    """Return the same stamp in all processes of a torchrun without an id: the first one in torchrun's store.

    (Ranks that Lightning starts get the run directory on their command line.)
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("--rdzv-id: torchrun needs this option with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.")
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set("vitrail/stamp", "", stamp).decode()


def _run_dir(logs: str, task: str, resume: str | None) -> str:
    if not resume:
        return str(Path(logs) / task / "runs" / _stamp())
    directory = Path(str(resume)).expanduser().absolute()
    if directory.is_file():
        run = directory.parent.parent if directory.parent.name == "checkpoints" else directory.parent
        raise ValueError(f"resume={resume}: is a file; set it to the run directory: resume={run}.")
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"resume={resume}: not a run directory (no config.yaml).")
    return str(directory)


def _needed(key: str, what: str) -> str:
    """Raise an error for a required value of an experiment; a config group's null would override OmegaConf's `???`."""
    raise ValueError(f"{key}: not set; this experiment needs {what}, {key}=...")


def _auto_precision() -> str:
    import torch

    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def _imagenet(folder: str = "") -> str | None:
    """Return `VITRAIL_IMAGENET`, or a folder below it; None if the variable is not set."""
    root = os.environ.get("VITRAIL_IMAGENET")
    return str(Path(root) / folder) if root else None


def register() -> None:
    """Register the resolvers; vitrail's entry points call this, so that importing has no side effects."""
    resolvers: dict[str, Callable[..., Any]] = {
        "home": lambda: str(home()),
        "run_dir": _run_dir,
        "sweep_dir": lambda logs, task: str(Path(logs) / task / "multiruns" / _stamp()),
        "needed": _needed,
        "imagenet": _imagenet,
        "auto_precision": _auto_precision,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"vitrail.{name}", resolver, replace=True)
