"""Which training a benchmark measures: from the command line to the training's config."""

from collections.abc import Sequence
from typing import Any

import timm
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vitrail.runs.assembly import model_name
from vitrail.runs.config import compose, settle_model
from vitrail_runtime.project import CONF


def training_overrides() -> list[str]:
    """Return the overrides of the command line without those of the benchmark itself: those of `src/train.py`."""
    own = OmegaConf.load(CONF / "benchmark_train.yaml")
    given = HydraConfig.get().overrides.task
    return [override for override in given if override.partition("=")[0].lstrip("+~") not in own]


def uses_synthetic(config: DictConfig, overrides: Sequence[str]) -> bool:
    """Return whether batches are made in advance: as the benchmark's config says, or unless the overrides name data."""
    if config.synthetic != "auto":
        return bool(config.synthetic)
    return not any(override.startswith(("data=", "data.root=")) for override in overrides)


def training_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a training that is measured.

    Without a data set or an experiment among the overrides, the data is ImageNet at the backbone's published size.

    Args:
        overrides: those of `src/train.py`.
    """
    keys = {override.partition("=")[0].lstrip("+") for override in overrides}
    if keys & {"data", "experiment"}:
        config = compose("train", overrides)
        settle_model(config)
        return config
    config = compose("train", ["data=imagenet", *overrides])
    name = model_name(config.model)
    if "data.image_size" not in keys and timm.is_model(name) and (cfg := timm.get_pretrained_cfg(name)) is not None:
        config.data.image_size = list(cfg.input_size[1:])
    return config


def compared(overrides: Sequence[str], against: Any) -> list[str]:
    """Return the overrides of another training.

    Args:
        overrides: those of the first training, which the other one keeps.
        against: model of the other training (a file in conf/model, or timm's name), or a list of overrides.
    """
    given = [against] if isinstance(against, str) else against
    changes = [change for item in given for change in ([item] if "=" in item else _model_overrides(item))]
    keys = {change.partition("=")[0].lstrip("+~") for change in changes}

    def is_replaced(override: str) -> bool:
        key = override.partition("=")[0].lstrip("+~")
        return any(key == other or key.startswith(f"{other}.") for other in keys)

    return [*(override for override in overrides if not is_replaced(override)), *changes]


def _model_overrides(name: str) -> list[str]:
    known = (CONF / "model" / f"{name}.yaml").is_file()
    return [f"model={name}"] if known else ["model=timm", f"model.name={name}"]
