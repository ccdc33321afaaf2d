"""Check the top-level keys of a program's config; deeper keys are checked by the constructors that get them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from vitrail.errors import ConfigError
from vitrail.runs.config import plain
from vitrail.types import ImageSize
from vitrail_runtime.checking import (
    Length,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Range,
    check_value,
)
from vitrail_runtime.project import CONF


def check_keys(config: DictConfig, program: str) -> None:
    """Check top-level keys and their values; deeper keys are checked by the constructors that they are passed to.

    Raises:
        ConfigError: there is an unknown key or a value of another type; the message names the first one.
    """
    known = _known_keys(program)
    if unknown := [str(key) for key in config if key not in known]:
        raise ConfigError(f"{unknown[0]}: no such config key; nothing reads it.")
    values = {**(_VALUES["train"] if program == "benchmark_train" else {}), **_VALUES[program]}
    for key, hint in values.items():
        if not OmegaConf.is_missing(config, key):
            value = OmegaConf.select(config, key)
            check_value(key, plain(value) if OmegaConf.is_config(value) else value, hint)


def _known_keys(program: str) -> set[str]:
    """Return the keys and groups of a program's config, and of the config that it extends."""
    primary: Any = OmegaConf.load(CONF / f"{program}.yaml")
    known = {str(key) for key in primary}
    for item in primary.defaults:
        if OmegaConf.is_dict(item):
            known |= {key.split()[-1].lstrip("/") for key in item}
        elif item != "_self_":
            known |= _known_keys(item)
    return known


_OPTIONAL = str | None
_COMPILE = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"] | None
_VALUES: dict[str, dict[str, Any]] = {
    "train": {
        "seed": NonNegativeInt,
        "epochs": PositiveInt,
        "backbone": str,
        "init_from": _OPTIONAL,
        "plan": bool,
        "resume": _OPTIONAL,
        "reproduce": _OPTIONAL,
        "compile": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite", "auto"]
        | None,
        "kernels.attention": Literal["auto", "cudnn", "flash"] | None,
        "kernels.tf32": bool | Literal["auto"],
        "kernels.channels_last": bool | Literal["auto"],
        "grad_checkpointing": bool,
        # Lightning's annotations have no ranges.
        "trainer.max_epochs": PositiveInt,
        "trainer.num_nodes": PositiveInt,
        "trainer.accumulate_grad_batches": PositiveInt,
        "trainer.gradient_clip_val": NonNegative | None,
        "trainer.check_val_every_n_epoch": PositiveInt | None,
        "trainer.num_sanity_val_steps": Annotated[int, Range(ge=-1)],
        "trainer.log_every_n_steps": NonNegativeInt,
        "trainer.limit_train_batches": NonNegative | None,
        "trainer.limit_val_batches": NonNegative | None,
    },
    "eval": {"seed": NonNegativeInt, "ckpt": _OPTIONAL, "backbone": str, "masks": bool},
    "annotate": {
        "seed": NonNegativeInt,
        "top_k": PositiveInt,
        "grid": Annotated[Sequence[PositiveInt], Length(2)] | None,
        "flip": bool,
        "batch_size": PositiveInt,
        "processes": PositiveInt | None,
        "num_workers": NonNegativeInt | None,
        "preview": NonNegativeInt,
    },
    "pack": {
        "seed": NonNegativeInt,
        "out": str,
        "size": Literal["original"] | PositiveInt,
        "quality": Annotated[int, Range(ge=1, le=100)],
        "processes": PositiveInt | None,
        "verify": bool,
        "shard_images": PositiveInt | None,
    },
    "doctor": {"seed": NonNegativeInt, "sample": PositiveInt, "checksums": bool},
    "export": {"ckpt": str, "out": _OPTIONAL},
    "predict": {
        "ckpt": _OPTIONAL,
        "images": str,
        "out": str,
        "top_k": PositiveInt,
        "overlay": _OPTIONAL,
        "masks": _OPTIONAL,
        "backbone": str,
        "image_size": ImageSize | None,
        "batch_size": PositiveInt,
        "num_workers": NonNegativeInt | None,
        "device": str,
    },
    "report": {
        "runs": str | list[str],
        "out": str,
        "metric": _OPTIONAL,
        "evaluations": _OPTIONAL,
        "live": bool,
        "interval": Positive,
    },
    "benchmark": {
        "train": bool,
        "tune": bool,
        "batch_size": PositiveInt,
        "image_size": ImageSize | None,
        "num_classes": PositiveInt,
        "compile": _COMPILE,
        "threads": PositiveInt | None,
        "rounds": PositiveInt,
        "steps": PositiveInt,
        "csv": _OPTIONAL,
    },
    "benchmark_train": {
        "train": bool,
        "tune": bool,
        "synthetic": bool | Literal["auto"],
        "against": str | Sequence[str] | None,
        "rounds": PositiveInt,
        "warmup": PositiveInt,
        "steps": PositiveInt,
        "peak": Positive | None,
        "json": _OPTIONAL,
        "threads": PositiveInt | None,
        "memory": Positive | None,
        "largest": PositiveInt,
    },
    "list_models": {"image_size": ImageSize | None, "num_classes": NonNegativeInt, "depth": NonNegativeInt},
}
"""Types of the keys that no constructor of vitrail checks, by program."""


def check_choices(config: DictConfig, choices: dict[str, tuple[str, ...]]) -> None:
    """Check that each key has one of its allowed values.

    Raises:
        ConfigError: a value is not allowed; the message names the key and the choices.
    """
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ConfigError(f"{key}={config[key]}: choose {', '.join(allowed)}.")
