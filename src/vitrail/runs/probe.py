"""Linear probes: build their module from a config, and refuse what does not fit a frozen backbone."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from torch import nn

from vitrail.data import ImageDataModule
from vitrail.errors import ConfigError
from vitrail.runs.config import instantiate

if TYPE_CHECKING:
    from vitrail.training import LinearProbe, ProbeSettings

_FSDP = "vitrail.training.FSDP"


def probe_settings(config: DictConfig) -> "ProbeSettings | None":
    """Return the settings of a linear probe; None for any other training.

    Raises:
        ConfigError: a setting is invalid, or does not fit a frozen backbone.
    """
    settings: ProbeSettings | None = instantiate(config.get("probe"), "probe")
    if settings is None:
        return None
    callbacks = config.get("callbacks") or {}
    refused = {
        "callbacks.ema": (callbacks.get("ema") is not None, "EMA weights", "null"),
        "phases": (config.get("phases") is not None, "phases of image size", "null"),
        "grad_checkpointing": (config.grad_checkpointing, "gradient checkpointing", "false"),
        "strategy": ((config.get("strategy") or {}).get("_target_") == _FSDP, "FSDP", "ddp"),
        "data.label_maps": (config.data.get("label_maps") is not None, "label maps", "null"),
        "trainer.limit_val_batches": (config.trainer.get("limit_val_batches") == 0, "no validation", "null"),
    }
    if settings.cache:
        refused["mixing"] = (config.get("mixing") is not None, "mixing, as features are cached,", "null")
        refused["teacher"] = (config.get("teacher") is not None, "a teacher, as features are cached,", "null")
    for key, (is_set, what, value) in refused.items():
        if is_set:
            raise ConfigError(f"{key}: a linear probe cannot be combined with {what}; set {key}={value}.")
    if config.get("init_from") is None and config.model.get("pretrained") is False:
        raise ConfigError(
            "init_from: not set, so the linear probe's backbone would have random weights; set init_from to a run or a"
            " weights file, or download timm's weights with model.pretrained=true."
        )
    return settings


def build_probe(
    settings: "ProbeSettings", model: nn.Module, objective: nn.Module, data: ImageDataModule, **kwargs: Any
) -> "LinearProbe":
    """Build the module of a linear probe; `kwargs` are other arguments of `ImageClassifier`.

    Raises:
        ConfigError: the backbone or the objective does not fit a linear probe.
    """
    from vitrail.models.probing import check_probe
    from vitrail.training import LinearProbe

    check_probe(model.eval(), data.input.size)
    return LinearProbe(model, objective, data.num_classes, settings, **kwargs)
