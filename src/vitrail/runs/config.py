"""Compose configs, and build objects from them: refuse what nothing reads, name the key of what fails."""

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

from vitrail.errors import ConfigError
from vitrail_runtime import resolvers
from vitrail_runtime.allowed_targets import guarded
from vitrail_runtime.project import CONF
from vitrail_runtime.renames import upgraded


def compose(program: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the config of a program as its command line would, for use from Python.

    Example: `train(compose("train", ["model=vit_nano", "epochs=1"]))`.

    Args:
        program: name of a file in conf/: `train`, `eval`, ...
        overrides: as on the command line.

    Raises:
        HydraException: an override that does not fit, in Hydra's words.
    """
    resolvers.register()
    with _initialised():
        config = hydra.compose(program, overrides=list(overrides), return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(Path(config.hydra.run.dir).absolute())
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def defaults_of(program: str) -> DictConfig:
    """Compose the config of a program without any override."""
    with _initialised():
        return hydra.compose(program)


def settle_model(config: DictConfig) -> None:
    """Let `model=<file>` on the command line choose the network, also over an experiment that names another one."""
    overrides = HydraConfig.get().overrides.task
    chosen = [item for item in overrides if item.startswith("model=")]
    if not chosen or any(item.lstrip("+").startswith("model.name=") for item in overrides):
        return
    with _initialised():
        node = hydra.compose("train", overrides=chosen[-1:]).model
    if node is not None and "name" in node and not OmegaConf.is_missing(node, "name") and "name" in config.model:
        config.model.name = node.name


@contextmanager
def _initialised() -> Iterator[None]:
    """Let Hydra know vitrail's configs, unless it knows some already."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def check_keys(config: DictConfig, program: str) -> None:
    """Refuse top-level keys that nothing reads; what lies deeper is passed to a constructor, which refuses its own.

    Raises:
        ConfigError: names the first such key.
    """
    primary: Any = OmegaConf.load(CONF / f"{program}.yaml")
    groups = [key.split()[-1].lstrip("/") for item in primary.defaults if OmegaConf.is_dict(item) for key in item]
    if unknown := [str(key) for key in config if key not in {*primary, *groups}]:
        raise ConfigError(f"{unknown[0]}: no such config key; nothing would read it.")


def check_choices(config: DictConfig, choices: dict[str, tuple[str, ...]]) -> None:
    """Refuse a value that is none of a key's.

    Raises:
        ConfigError: names the key.
    """
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ConfigError(f"{key}={config[key]}: choose {', '.join(allowed)}.")


def instantiate(config: Any, key: str, **kwargs: Any) -> Any:
    """Build the object that `config` describes; None for null.

    Raises:
        ConfigError: it cannot be built; the message starts with `key` unless it names a key itself.
    """
    if config is None:
        return None
    try:
        with guarded():
            # Deferred: Hydra would turn dataclasses among the arguments of instantiate() into configs.
            build = hydra.utils.instantiate(config, _partial_=True, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from error
        full_key = _full_key(str(error))
        where = key if not full_key or full_key == key else f"{key}.{full_key}"
        reason = str(cause) if cause is not None and str(cause) else str(error).splitlines()[0]
        raise ConfigError(_sentence(where, reason)) from error
    try:
        return build(**kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(_sentence(key, str(error))) from error


def _full_key(message: str) -> str:
    lines = [line for line in message.splitlines() if line.startswith("full_key: ")]
    return lines[0].removeprefix("full_key: ") if lines else ""


def _sentence(key: str, reason: str) -> str:
    """One line that starts with the key; a constructor's complaint about an argument in the words of a config."""
    first = reason.strip().splitlines()[0]
    if first.startswith(f"{key}."):
        return first
    _, found, argument = first.partition("got an unexpected keyword argument ")
    return f"{key}: no such key {argument}." if found else f"{key}: {first}"


def plain(config: DictConfig | ListConfig) -> Any:
    """Return the config as dicts, lists and scalars, interpolations resolved, so that it loads anywhere and safely."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def restore(config: DictConfig, defaults: DictConfig, directory: Path) -> DictConfig:
    """The config of the run in `directory`, with what the command line says on top.

    Args:
        config: as composed with the command line, which names only what is to change.
        defaults: as composed without it; what differs follows from the command line, through interpolations too.
        directory: the run.
    """
    saved = OmegaConf.create(moved(upgraded(plain(OmegaConf.load(directory / "config.yaml"))), directory))
    before, now = _leaves(plain(defaults)), _leaves(plain(config))
    with open_dict(saved):
        named = [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
        for key in [*named, *(["strategy"] if "trainer" in named else [])]:  # a trainer chooses its strategy
            if OmegaConf.select(config, key) is not None:  # a group replaces the run's whole group
                value = OmegaConf.select(config, key)
                OmegaConf.update(saved, key, plain(value) if OmegaConf.is_config(value) else value, merge=False)
        for key, value in now.items():
            if key not in before or before[key] != value:
                OmegaConf.update(saved, key, value)
    return saved


def moved(saved: dict[str, Any], run: Path) -> dict[str, Any]:
    """The config of a run with `run` in place of the directory that it ran in."""
    before = str(saved["paths"]["run"])

    def replaced(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: replaced(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [replaced(value) for value in tree]
        return tree.replace(before, str(run)) if isinstance(tree, str) else tree

    return replaced(saved)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that is not a dict."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _leaves(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
