"""The run directory: what a run was told, what it ran on, and what came out."""

import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from vitrail.errors import ConfigError
from vitrail_runtime.project import checkout

log = logging.getLogger(__name__)

_PACKAGES = ("vitrail", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "torchmetrics", "timm", "numpy")


class RunDirectory:
    """Files of one run.

    ```
    config.yaml       resolved config                 metrics.csv        one row an epoch
    overrides.txt     the command line's overrides    checkpoints/       last.ckpt and best.ckpt
    versions.yaml     git commit, packages, machine   train.log          what the terminal showed, and tracebacks
    results.json      best and last metrics           first_batch.png    what the network saw first
    ```

    Args:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """Checkpoint with the best monitored metric."""
        return self.checkpoints / "best.ckpt"

    def claim(self, patience: float) -> None:
        """Keep other trainings out of the directory for as long as this process lives.

        Args:
            patience: seconds to wait for one that is there to end.

        Raises:
            ConfigError: it stays.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = (self.path / ".lock").open("w")
        except OSError:  # the first file that has to be written says so
            return
        deadline = time.monotonic() + patience
        if patience and not _locked(self._claim):
            log.warning("%s: another process is training there; waiting up to %d s for its end", self.path, patience)
        while not _locked(self._claim):
            if time.monotonic() >= deadline:
                raise ConfigError(f"{self.path}: another process is training there; end it first, then resume.")
            time.sleep(1)

    def record(self, config: dict[str, Any], overrides: list[str]) -> None:
        """Write what the run was told and what it runs on; call on one process.

        Raises:
            ConfigError: the directory cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
            self.write("overrides.txt", "".join(f"{override}\n" for override in overrides))
            self.write("versions.yaml", OmegaConf.to_yaml(OmegaConf.create(versions())))
        except OSError as error:
            raise ConfigError(f"paths.logs: cannot write to {self.path} ({error.strerror}).") from error

    def write(self, name: str, text: str) -> None:
        """Write a file of the run; a reader never sees half of it."""
        target = self.path / name
        unfinished = target.with_name(f".{name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json, from which sweeps and reports read."""
        self.write("results.json", json.dumps(results, indent=1))


def _locked(file: IO[str]) -> bool:
    """Whether this process could lock the file, or the file system has no locks.

    Loader processes that outlive the training for a moment do not hold this kind.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def find_checkpoint(ckpt: str, key: str = "ckpt") -> Path:
    """The checkpoint file that `ckpt` names: itself, or a run directory's best.

    Raises:
        ConfigError: there is none.
    """
    path = Path(ckpt).expanduser().absolute()
    if not path.is_dir():
        return path
    run = RunDirectory(path)
    for candidate in (run.best, run.last):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{key}={ckpt}: neither a checkpoint nor a run directory with one.")


def is_rank_zero() -> bool:
    """Whether this process writes for all of them; known from the environment, before any group of processes is."""
    return getattr(rank_zero_only, "rank", 0) == 0


def versions() -> dict[str, Any]:
    """Git commit (with `-dirty` where files differ from it), package versions, Python and the machine."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": found,
    }


def _commit() -> str | None:
    project = checkout()
    if project is None:
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout
