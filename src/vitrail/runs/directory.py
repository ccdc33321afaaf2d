"""The run directory: config, versions, checkpoints and results of a run."""

import errno
import fcntl
import json
import logging
import os
import platform
import re
import struct
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from vitrail.checkpoints.reading import EXPORTED_NAMES, read_config
from vitrail.errors import ConfigError
from vitrail_runtime.project import checkout

log = logging.getLogger(__name__)

_PACKAGES = ("vitrail", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "torchmetrics", "timm", "numpy")


class RunDirectory:
    """Files of one run.

    ```
    config.yaml       resolved config                 metrics.csv        one row per epoch
    overrides.txt     overrides of the command line   checkpoints/       last.ckpt and best.ckpt
    versions.yaml     git commit, packages, machine   train.log          log messages and tracebacks
    results.json      best and last metrics           first_batch.png    first training batch
                                                      predictions.png    last predictions of validation images
    ```

    Args:
        path: run directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
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
        """Lock the directory against other runs while this process lives.

        Args:
            patience: seconds to wait until another training in the directory ends.

        Raises:
            ConfigError: the other training is still running after that time.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = (self.path / ".lock").open("w")
        except OSError:  # `record` reports that the directory cannot be written to
            return
        deadline = time.monotonic() + patience
        if patience and not locked(self._claim):
            log.warning("%s: another process is training there; waiting up to %d s until it ends", self.path, patience)
        while not locked(self._claim):
            if time.monotonic() >= deadline:
                raise ConfigError(f"{self.path}: another process is training there; stop it first, then resume.")
            time.sleep(1)

    def record(self, config: dict[str, Any], overrides: list[str]) -> None:
        """Write config, overrides and versions; call on one process only.

        Raises:
            ConfigError: the directory cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
            self._write_overrides(overrides, is_resumed=bool(config.get("resume")))
            self.write("versions.yaml", OmegaConf.to_yaml(OmegaConf.create(versions())))
        except OSError as error:
            raise ConfigError(f"paths.logs: cannot write to {self.path} ({error.strerror}).") from error

    def _write_overrides(self, overrides: list[str], is_resumed: bool) -> None:
        """Write the overrides of a new run, or add those of a resumed one below a comment, unless they are the same."""
        file, lines = self.path / "overrides.txt", "".join(f"{override}\n" for override in overrides)
        before = file.read_text(encoding="utf-8") if is_resumed and file.is_file() else ""
        if not before:
            self.write(file.name, lines)
        elif lines != re.split(r"^# resumed.*\n", before, flags=re.MULTILINE)[-1]:
            self.write(file.name, f"{before}# resumed {time.strftime('%Y-%m-%d %H:%M:%S')}\n{lines}")

    def write(self, name: str, text: str) -> None:
        """Write a file of the run atomically."""
        target = self.path / name
        unfinished = target.with_name(f".{name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json, which sweeps and reports read."""
        self.write("results.json", json.dumps(results, indent=1))


def locked(file: IO[str]) -> bool:
    """Lock a file; return False if another process has locked it, True also if the file system has no locks.

    Data loader workers do not inherit this kind of lock, so those that briefly outlive the training do not hold it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


_FLOCKS = {"linux": ("hhqqi4x", 0), "darwin": ("qqihh", 3)}  # struct flock in 64 bits, and where its type is


def is_claimed(path: Path) -> bool | None:
    """Return whether a process is training in a run directory; the lock itself is not touched.

    None: this cannot be told on this system (other than Linux and macOS).
    """
    if sys.platform not in _FLOCKS:
        return None
    layout, place = _FLOCKS[sys.platform]
    fields = [0] * 5  # from the start of the file to its end
    fields[place] = fcntl.F_WRLCK
    try:
        with (path / ".lock").open("rb") as file:
            found = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *fields)))
    except OSError:
        return False
    return found[place] != fcntl.F_UNLCK


def find_checkpoint(ckpt: str, key: str = "ckpt") -> Path:
    """Return the checkpoint file that `ckpt` refers to: the file itself, or the best one of a run directory.

    Raises:
        ConfigError: the directory contains no checkpoint.
    """
    path = Path(ckpt).expanduser().absolute()
    if not path.is_dir():
        return path
    run = RunDirectory(path)
    for candidate in (run.best, run.last):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{key}={ckpt}: neither a checkpoint nor a run directory with one.")


def find_weights_file(path: str | Path, key: str = "ckpt") -> tuple[Path, dict[str, Any] | None]:
    """Return the weights file that `path` refers to, and the `config.json` beside it if it is an export.

    Args:
        path: run directory, exported folder, or file.
        key: config key of `path`, for error messages.

    Raises:
        ConfigError: a folder contains no weights.
    """
    folder = Path(path).expanduser().absolute()
    described = read_config(folder / "config.json")
    if folder.is_dir() and described is not None:
        found = [folder / name for name in EXPORTED_NAMES if (folder / name).is_file()] or sorted(folder.glob("*.pth"))
        if not found:
            raise ConfigError(
                f"{key}={path}: this export contains no PyTorch weights; export again with to=safetensors, for example."
            )
        return found[0], described
    if (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{key}={path}: its config.json is damaged or has no architecture; use a folder from timm or export.py."
        )
    file = find_checkpoint(str(path), key)
    is_export = file.name in EXPORTED_NAMES or file.suffix == ".pth"
    return file, read_config(file.with_name("config.json")) if is_export else None


def is_rank_zero() -> bool:
    """Return whether this is rank 0, by the environment, so that it works before the process group exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


def versions() -> dict[str, Any]:
    """Return git commit (with `-dirty` if there are uncommitted changes), package versions, Python and platform."""
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
