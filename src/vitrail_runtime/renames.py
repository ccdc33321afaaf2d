"""Renamed config keys, files and classes: for error messages, and for configs saved by earlier versions."""

from typing import Any

from hydra.errors import HydraException

_SOURCE_KEYS = ("name", "root", "download", "classes", "train_dir", "val_dir", "index", "images")
_MIXING_KEYS = ("mixup", "cutmix", "prob", "switch_prob", "mode", "tokens", "alpha", "whole_sides")
_GUARD_KEYS = ("path", "last", "on_bad", "limit", "factor")

RENAMED_KEYS = {
    "augment.maps_follow": "augment.warp_label_maps",
    "augment.mix": "mixing (mixing=none, mixup_cutmix, mixtoken)",
    "callbacks.keep": "callbacks.preemption",
    "callbacks.numbers": "callbacks.nonfinite_guard",
    "checkpointing": "grad_checkpointing",
    "ckpt": "init_from",
    "data.square_maps": "data.center_square_maps",
    "model.dense_head": "model.token_head",
    "objective.dense_weight": "objective.token_weight",
    "objective.ground_truth": "targets.ground_truth",
    "objective.smoothing": "targets.smoothing for token labels (a distillation has objective.base.smoothing)",
    "objective.transpose_crops": "targets.transpose_crops",
    "optimizer.backbone_lr": "optimizer.backbone_lr_scale",
    "schedule.late": "schedule.epoch_lag",
    **{f"augment.mix.{key}": f"mixing.{key}" for key in _MIXING_KEYS},
    **{f"callbacks.keep.{key}": f"callbacks.preemption.{key}" for key in ("path", "minutes", "stop")},
    **{f"callbacks.numbers.{key}": f"callbacks.nonfinite_guard.{key}" for key in _GUARD_KEYS},
    **{f"data.{key}": f"data.source.{key}" for key in _SOURCE_KEYS if key != "root"},
}
"""Config keys of version 0.1 and their current names."""

RENAMED_CHOICES = {
    "model": {
        "deit3_base": "model=deit3 model.name=deit3_base_patch16_224",
        "deit3_huge": "model=deit3 model.name=deit3_huge_patch14_224",
        "deit3_large": "model=deit3 model.name=deit3_large_patch16_224",
        "deit3_medium": "model=deit3 model.name=deit3_medium_patch16_224",
        "deit3_small": "model=deit3 model.name=deit3_small_patch16_224",
        "deit_base": "model=deit model.name=deit_base_patch16_224",
        "deit_base_distilled": "model=deit model.name=deit_base_distilled_patch16_224",
        "deit_nano_distilled": "model=vit model.name=deit_nano_distilled",
        "deit_small_distilled": "model=deit model.name=deit_small_distilled_patch16_224",
        "deit_tiny": "model=deit model.name=deit_tiny_patch16_224",
        "deit_tiny_distilled": "model=deit model.name=deit_tiny_distilled_patch16_224",
        "lvvit_l": "model=lvvit model.name=lvvit_l",
        "lvvit_m": "model=lvvit model.name=lvvit_m",
        "lvvit_t": "model=lvvit model.name=lvvit_t",
        "t2t_vit_10": "model=t2t_vit model.name=t2t_vit_10",
        "t2t_vit_12": "model=t2t_vit model.name=t2t_vit_12",
        "t2t_vit_14_resnext": "model=t2t_vit model.name=t2t_vit_14_resnext",
        "t2t_vit_14_se": "model=t2t_vit model.name=t2t_vit_14_se",
        "t2t_vit_14_wide": "model=t2t_vit model.name=t2t_vit_14_wide",
        "t2t_vit_16_ghost": "model=t2t_vit model.name=t2t_vit_16_ghost",
        "t2t_vit_19": "model=t2t_vit model.name=t2t_vit_19",
        "t2t_vit_7": "model=t2t_vit model.name=t2t_vit_7",
        "t2t_vit_dense": "model=t2t_vit model.name=t2t_vit_dense",
        "t2t_vit_t_14": "model=t2t_vit_t model.name=t2t_vit_t_14",
        "t2t_vit_t_19": "model=t2t_vit_t model.name=t2t_vit_t_19",
        "t2t_vit_t_24": "model=t2t_vit_t model.name=t2t_vit_t_24",
        "vit_base": "model=vit model.name=vit_base_patch16_224",
        "vit_giant": "model=vit model.name=vit_giant_patch14_224",
        "vit_gigantic": "model=vit model.name=vit_gigantic_patch14_224",
        "vit_huge": "model=vit model.name=vit_huge_patch14_224",
        "vit_large": "model=vit model.name=vit_large_patch16_224",
        "vit_plain_small": "model=vit model.name=vit_plain_small_patch16_224",
        "vit_small": "model=vit model.name=vit_small_patch16_224",
        "vit_tiny": "model=vit model.name=vit_tiny_patch16_224",
    },
}
"""Config group files of version 0.1 and the overrides that replace them."""

_TARGETS = {
    "vitrail.data.Mixing": "vitrail.data.MixupCutMix",
    "vitrail.run.preservation.BestCheckpoints": "vitrail.checkpoints.writing.BestCheckpoints",
    "vitrail.run.preservation.KeepWork": "vitrail.runs.preemption.Preemption",
    "vitrail.training.NumberGuard": "vitrail.training.NonfiniteGuard",
    "vitrail.insight.FirstBatchPicture": "vitrail.reporting.FirstBatchPicture",
    "vitrail.insight.LabelMapPicture": "vitrail.reporting.LabelMapPicture",
    "vitrail.run.loggers.wandb": "vitrail.runs.loggers.wandb",
    "vitrail.run.loggers.tensorboard": "vitrail.runs.loggers.tensorboard",
    "vitrail.run.loggers.mlflow": "vitrail.runs.loggers.mlflow",
    "vitrail.models.annotator.timm_annotator": "vitrail.models.pretrained.timm_classifier",
    "vitrail.run.annotation.run_annotator": "vitrail.runs.trained.run_classifier",
}
"""Classes and functions of version 0.1 and their current names."""

_SOURCES = {
    "DigitsDataModule": "Digits",
    "TorchvisionDataModule": "TorchvisionDataset",
    "ImageFolderDataModule": "ImageFolder",
    "ImageNetDataModule": "ImageNet",
    "ImageNetRealDataModule": "ImageNetReal",
    "ImageNetVariantDataModule": "ImageNetVariant",
}


def check_overrides(arguments: list[str], program: str) -> None:
    """Refuse old keys that an override adds or deletes; Hydra refuses the others, and `sentences` names the new key.

    Raises:
        HydraException: the message names the new key; or conf/sweep/wandb.yaml, which is not for Hydra, is chosen.
    """
    if "sweep=wandb" in arguments:
        raise HydraException("sweep=wandb: this file is for W&B's agent: wandb sweep conf/sweep/wandb.yaml.")
    current = ("objective.smoothing", *(() if program == "train" else ("ckpt",)))  # these exist elsewhere
    for argument in arguments:
        key = argument.partition("=")[0].replace("/", ".")
        old = key.lstrip("+~")
        if old != key and old in RENAMED_KEYS and old not in current:
            raise HydraException(f"{old}: renamed to {RENAMED_KEYS[old]}.")


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a plain config of any earlier version to the current names; current configs stay unchanged."""
    config = _renamed_targets(config)
    if "mix" in (config.get("augment") or {}):
        config["mixing"] = config["augment"].pop("mix")
    _move(config, "augment", "maps_follow", "warp_label_maps")
    _move(config, "data", "square_maps", "center_square_maps")
    _move(config, "model", "dense_head", "token_head")
    _move(config, "optimizer", "backbone_lr", "backbone_lr_scale")
    _move(config, "schedule", "late", "epoch_lag")
    _move(config, "callbacks", "keep", "preemption")
    _move(config, "callbacks", "numbers", "nonfinite_guard")
    for old, new in (("ckpt", "init_from"), ("checkpointing", "grad_checkpointing")):
        if old in config and "objective" in config:  # a training's config; in eval and export, `ckpt` is a current key
            config[new] = config.pop(old)
    if "objective" in config:
        config.setdefault("mixing", None)
        config.setdefault("targets", {"_target_": "vitrail.training.TargetBuilder"})
    _upgrade_token_labels(config)
    _upgrade_data(config.get("data") or {})
    return config


def _renamed_targets(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            key: _TARGETS.get(value, value) if key == "_target_" and isinstance(value, str) else _renamed_targets(value)
            for key, value in tree.items()
        }
    return [_renamed_targets(value) for value in tree] if isinstance(tree, list) else tree


def _move(config: dict[str, Any], group: str, old: str, new: str) -> None:
    node = config.get(group)
    if isinstance(node, dict) and old in node:
        node[new] = node.pop(old)


def _upgrade_token_labels(config: dict[str, Any]) -> None:
    """Move the settings that build targets from the objective to the target builder."""
    objective = config.get("objective") or {}
    if "dense_weight" not in objective:
        return
    objective["token_weight"] = objective.pop("dense_weight")
    moved = {key: objective.pop(key) for key in ("smoothing", "ground_truth", "transpose_crops") if key in objective}
    config["targets"] = {"_target_": "vitrail.training.TargetBuilder", **moved}


def _upgrade_data(data: dict[str, Any]) -> None:
    """Replace the data module of one data set by `ImageDataModule` with a source."""
    source = _SOURCES.get(str(data.get("_target_", "")).rpartition(".")[2])
    if source is None or "source" in data:
        return
    data["_target_"] = "vitrail.data.ImageDataModule"
    named = {key: data[key] if key == "root" else data.pop(key) for key in _SOURCE_KEYS if key in data}
    data["source"] = {"_target_": f"vitrail.data.sources.{source}", **named}
