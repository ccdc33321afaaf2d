"""What configs can ask for by `${name:...}`; Hydra looks for plugins in this folder.

Hydra imports this file at every start, so it imports nothing heavy.
"""

import os
import secrets
import time
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

PROJECT = Path(__file__).resolve().parents[2]


@cache
def _stamp() -> str:
    """Date, time and a part that two jobs started in the same second do not share; one for all processes of a job.

    Where processes compose their configs each for itself, and may be started again, it is what names their job.
    """
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return f"slurm_{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"  # of one srun, requeued or not
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id and run_id != "none":  # torchrun's --rdzv-id, or what it drew for one machine
        return f"torchrun_{run_id}"
    stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"
    return _agree(stamp) if run_id else stamp


def _agree(stamp: str) -> str:
    """The first stamp that a process of a torchrun without an id proposes, through torchrun's store.

    (The ranks that Lightning starts are given the run directory on their command line.)
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("--rdzv-id: torchrun needs one with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.")
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set("vitrail/stamp", "", stamp).decode()


def _run_dir(logs: str, task: str, resume: str | None) -> str:
    if not resume:
        return str(Path(logs) / task / "runs" / _stamp())
    directory = Path(resume).expanduser().absolute()
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"resume={resume}: no run directory (it would hold a config.yaml).")
    return str(directory)


def _needed(key: str, what: str) -> str:
    """For values that an experiment cannot do without; OmegaConf's ??? gives way to the group's null."""
    raise ValueError(f"{key}: not set; this experiment needs {what}, {key}=...")


def _auto_precision() -> str:
    import torch

    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


OmegaConf.register_new_resolver("project", lambda: str(PROJECT), replace=True)
OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
OmegaConf.register_new_resolver(
    "sweep_dir", lambda logs, task: str(Path(logs) / task / "multiruns" / _stamp()), replace=True
)
OmegaConf.register_new_resolver("needed", _needed, replace=True)
OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)
