"""Compose configs and build objects from them; errors name the config key."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vitrail.errors import ArgumentError, ConfigError
from vitrail_runtime import resolvers
from vitrail_runtime.allowed_targets import guarded
from vitrail_runtime.checking import (
    check_arguments,
)
from vitrail_runtime.null_groups import without_null_groups
from vitrail_runtime.project import CONF
from vitrail_runtime.renames import upgraded


def compose(program: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a program's config, as its command line does, for use from Python.

    Example: `train(compose("train", ["model=vit_nano", "epochs=1"]))`.

    Args:
        program: name of a file in conf/: `train`, `eval`, ...
        overrides: overrides as on the command line.

    Raises:
        HydraException: an override is invalid.
    """
    resolvers.register()
    resolvers.renew()
    with _initialised():
        config = hydra.compose(program, overrides=without_null_groups(overrides, program), return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(Path(config.hydra.run.dir).absolute())
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def output_directory() -> Path:
    """Return the directory of this run.

    Raises:
        ConfigError: the config was composed by Hydra alone, without a directory.
    """
    if not HydraConfig.initialized():
        raise ConfigError(
            'config: was composed without a run directory; in Python use vitrail.runs.compose("train", overrides).'
        )
    return Path(HydraConfig.get().runtime.output_dir)


def defaults_of(program: str) -> DictConfig:
    """Compose a program's config without overrides."""
    with _initialised():
        return hydra.compose(program)


def named_keys() -> list[str]:
    """Return the keys and groups that the command line sets."""
    return [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]


def settle_model(config: DictConfig) -> None:
    """Apply `model=<file>` from the command line also if an experiment sets `model.name`, in place."""
    overrides = HydraConfig.get().overrides.task
    chosen = [item for item in overrides if item.startswith("model=")]
    if not chosen or any(item.lstrip("+").startswith("model.name=") for item in overrides):
        return
    with _initialised():
        where = [item for item in HydraConfig.get().overrides.hydra if item.startswith("hydra.searchpath=")]
        node = hydra.compose("train", overrides=[chosen[-1], *where]).model
    if node is None or "name" not in config.model:
        return
    if OmegaConf.is_missing(node, "name"):
        config.model.name = "???"
    elif "name" in node:
        config.model.name = OmegaConf.to_container(node)["name"]  # type: ignore[index,call-overload]  # may be ${backbone}
    else:  # the experiment's name belongs to another backbone
        with open_dict(config.model):
            del config.model["name"]


@contextmanager
def _initialised() -> Iterator[None]:
    """Initialise Hydra with vitrail's configs, unless it is initialised already."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def instantiate(config: Any, key: str, **kwargs: Any) -> Any:
    """Build the object that `config` describes; None for null.

    Raises:
        ConfigError: the object cannot be built; the message starts with `key`, or with the full key of the cause.
    """
    if config is None:
        return None
    try:
        with guarded():
            # Not called here with `kwargs`: Hydra would convert dataclasses among them to configs.
            build = hydra.utils.instantiate(config, _partial_=True, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        full_key = _full_key(str(error))
        where = full_key if full_key.startswith(key) else f"{key}.{full_key}" if full_key else key
        if isinstance(cause, ArgumentError):
            raise cause.with_key(where) from error
        if isinstance(cause, ConfigError):
            raise cause from error
        reason = str(cause) if cause is not None and str(cause) else str(error).splitlines()[0]
        raise ConfigError(_sentence(where, reason)) from error
    try:
        if str(build.func.__module__).startswith("lightning."):  # vitrail's classes are decorated with `checked`
            check_arguments(build.func, (), build.keywords)
        return build(**kwargs)
    except ArgumentError as error:
        raise error.with_key(key) from error
    except ConfigError:
        raise
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(_sentence(key, str(error))) from error


def _full_key(message: str) -> str:
    lines = [line for line in message.splitlines() if line.startswith("full_key: ")]
    return lines[0].removeprefix("full_key: ") if lines else ""


def _sentence(key: str, reason: str) -> str:
    """Return one line that starts with the key; an unexpected constructor argument is reported as an unknown key."""
    first = reason.strip().splitlines()[0]
    if first.startswith(f"{key}."):
        return first
    _, found, argument = first.partition("got an unexpected keyword argument ")
    return f"{key}: no such key {argument}." if found else f"{key}: {first}"


def plain(config: DictConfig | ListConfig) -> Any:
    """Return the config as dicts, lists and scalars with interpolations resolved, which any program can load safely."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def restore(config: DictConfig, defaults: DictConfig, directory: Path) -> DictConfig:
    """Return the saved config of the run in `directory`, with the overrides of the command line applied.

    Args:
        config: config composed with the command line, which names only the keys to change.
        defaults: config composed without the command line; all differences, including those through interpolations,
            are applied.
        directory: run directory.
    """
    saved = OmegaConf.create(moved(upgraded(plain(OmegaConf.load(directory / "config.yaml"))), directory))
    before, now = _leaves(plain(defaults)), _leaves(plain(config))
    with open_dict(saved):
        named = named_keys()
        for key in [*named, *(["strategy"] if "trainer" in named else [])]:  # trainer=... also selects a strategy
            value = OmegaConf.select(config, key)
            if key == "data.root":
                rebase(saved.data, value)
            elif value is not None:  # a group replaces the whole saved group
                OmegaConf.update(saved, key, plain(value) if OmegaConf.is_config(value) else value, merge=False)
            elif OmegaConf.select(saved, key) is not None:  # set to null, or deleted
                OmegaConf.update(saved, key, None, merge=False)
        for key, value in now.items():
            if key not in before or before[key] != value:
                OmegaConf.update(saved, key, value)
    return saved


def rebase(data: Any, root: str | None) -> None:
    """Set the `root` of a saved data config in place, also where its source refers to it: paths are saved resolved."""
    before, source = data.get("root"), data.get("source") or {}
    data["root"] = root
    for key, value in source.items():
        if value == before or (before and isinstance(value, str) and value.startswith(f"{before}/")):
            source[key] = root if value == before else f"{root}{value.removeprefix(before)}"


def moved(saved: dict[str, Any], run: Path) -> dict[str, Any]:
    """Return the saved config of a run with its old directory replaced by `run`."""
    before = str(saved["paths"]["run"])

    def replaced(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: replaced(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [replaced(value) for value in tree]
        return tree.replace(before, str(run)) if isinstance(tree, str) else tree

    return replaced(saved)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by their dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _leaves(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
