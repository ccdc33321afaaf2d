"""Optimisers of the recipes: timm's by name, with the learning rate scaled to the effective batch size."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vitrail.errors import ConfigError
from vitrail.training.lamb import update_at_once
from vitrail.training.muon import allow_shards, first_and_last
from vitrail_runtime.checking import NonNegative, NonNegativeInt, PositiveInt, Range, checked

_LR_RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}  # exponent of the batch ratio


@checked
class OptimizerFactory:
    """Factory that builds an optimiser once the effective batch size is known.

    One-dimensional parameters, biases and the parameters in the model's `no_weight_decay()` get no weight decay, as in
    the published recipes.

    Args:
        name: any name in `timm.optim.list_optimizers()`.
        lr: base learning rate.
        weight_decay: weight decay of the parameters that are not exempt from it.
        lr_scaling: `linear` multiplies `lr` by batch / reference, `sqrt` by the square root of that; `none` keeps `lr`.
        lr_reference_batch: effective batch size, in images, that `lr` is meant for.
        layer_decay: factor of the learning rate from each block to the one before it; None uses one learning rate.
        backbone_lr_scale: factor of the learning rate of the backbone, for fine-tuning: of all parameters except the
            modules that the model declares as `new_modules` (DynamicViT's predictors), or else its classifiers.
        scale_min_lr: apply `backbone_lr_scale` also to the schedule's warm-up and final learning rates, which are
            otherwise the same for all parameters.
        backbone_freeze_epochs: epochs at the start in which the backbone's learning rate is 0; its moments are updated.
        untrained: names of parameters that are not trained.
        decay_also: names of parameters that get weight decay although the model exempts them.
        decay_all: weight decay of all parameters, norms and biases included, as LV-ViT's segmentation code has it.
        adamw_first_last: for timm's Muon and its variants: update the first layer and the classifiers by AdamW, because
            Muon is meant for hidden layers. Vectors, position tables and tokens are always updated by AdamW.
        fused: update all parameters by a few kernels: PyTorch's fused Adam and AdamW, and timm's LAMB; ignored by other
            optimisers. `auto` is for configs, which replace it by the value for their device.
        options: further arguments of the optimiser (`betas`, `eps`, `momentum`, ...).
    """

    def __init__(
        self,
        name: str = "adamw",
        lr: NonNegative = 5e-4,
        weight_decay: NonNegative = 0.05,
        lr_scaling: Literal["none", "linear", "sqrt"] = "linear",
        lr_reference_batch: PositiveInt = 512,
        layer_decay: Annotated[float, Range(gt=0, le=1)] | None = None,
        backbone_lr_scale: NonNegative = 1.0,
        scale_min_lr: bool = False,
        backbone_freeze_epochs: NonNegativeInt = 0,
        untrained: Sequence[str] = (),
        decay_also: Sequence[str] = (),
        decay_all: bool = False,
        adamw_first_last: bool = False,
        fused: bool | Literal["auto"] = False,
        **options: Any,
    ) -> None:
        self.name, self.lr, self.weight_decay = name, float(lr), weight_decay
        self.lr_scaling, self.lr_reference_batch = lr_scaling, lr_reference_batch
        self.layer_decay, self.backbone_lr_scale, self.decay_also = layer_decay, backbone_lr_scale, tuple(decay_also)
        self.scale_min_lr, self.backbone_freeze_epochs = scale_min_lr, backbone_freeze_epochs
        self.decay_all = decay_all
        self.untrained, self.adamw_first_last, self.options = tuple(untrained), adamw_first_last, options
        self.fused = fused is True

    def scaled_lr(self, effective_batch: int) -> float:
        """Return the peak learning rate for `effective_batch` images per optimiser step, over all devices."""
        return self.lr * (effective_batch / self.lr_reference_batch) ** _LR_RULES[self.lr_scaling]

    def build(
        self,
        model: nn.Module,
        effective_batch: int,
        others: Mapping[str, nn.Module] | None = None,
        lr_scales: Mapping[str, float] | None = None,
    ) -> torch.optim.Optimizer:
        """Build the optimiser for all trainable parameters of `model`.

        Args:
            model: backbone.
            effective_batch: images per optimiser step, over all devices.
            others: further trained modules by name, such as an objective's. They are trained like a classifier: at the
                full learning rate, with weight decay of their matrices only.
            lr_scales: factors of the learning rates of modules in `others`, by their names.

        Raises:
            ConfigError: timm has no such optimiser, or it does not accept one of the options.
        """
        names = {name for name, _ in model.named_parameters()}
        if self.decay_all and self.decay_also:
            raise ConfigError("optimizer.decay_also: decay_all=true includes all parameters; omit one of the two.")
        for option in ("decay_also", "untrained"):
            if unknown := [name for name in getattr(self, option) if name not in names]:
                raise ConfigError(f"optimizer.{option}: {unknown[0]} is not a parameter of {type(model).__name__}.")
        lr = self.scaled_lr(effective_batch)
        try:
            optimizer = create_optimizer_v2(
                model,
                opt=self.name,
                lr=lr,
                param_group_fn=lambda model: [
                    *self._groups(model, lr),
                    *self._other_groups(others or {}, lr_scales or {}),
                ],
                **self.options,
            )
        except (TypeError, ValueError, IndexError) as error:
            given = ", ".join(f"optimizer.{name}={value}" for name, value in self.options.items())
            raise ConfigError(f"optimizer.name={self.name}: {error}{f' ({given})' if given else ''}") from error
        if self.fused:
            _fuse(optimizer)
        if not allow_shards(optimizer) and self.adamw_first_last:
            raise ConfigError(f"optimizer.adamw_first_last=true: {self.name} is not a variant of Muon; omit it.")
        self._keep_settings(optimizer)
        return optimizer

    def _keep_settings(self, optimizer: Any) -> None:
        """Keep the config's settings when a checkpoint is loaded; only moments and counts come from the checkpoint."""
        base = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead wraps another optimiser
        keys = {"lr", "lr_scale", "weight_decay", "use_fallback", "freeze_epochs", "fused", "foreach", *self.options}
        settings = [{key: group[key] for key in keys & group.keys()} for group in base.param_groups]

        def restore_settings(loaded: torch.optim.Optimizer) -> None:
            for group, kept in zip(loaded.param_groups, settings, strict=True):
                group.update(kept)

        base.register_load_state_dict_post_hook(restore_settings)

    def _groups(self, model: Any, lr: float) -> list[dict[str, Any]]:
        exempt = set(getattr(model, "no_weight_decay", set)()) - set(self.decay_also)
        if self.layer_decay is not None:
            groups = param_groups_layer_decay(
                model,
                self.weight_decay,
                () if self.decay_all else exempt,
                layer_decay=self.layer_decay,
                weight_decay_exclude_1d=not self.decay_all,
            )
        elif self.decay_all:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            groups = [{"params": trained, "weight_decay": self.weight_decay}]
        else:
            groups = param_groups_weight_decay(model, self.weight_decay, no_weight_decay_list=exempt)
        untrained = {id(model.get_parameter(name)) for name in self.untrained}
        for group in groups if untrained else ():
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in untrained]
        if self.adamw_first_last:
            ends = first_and_last(model)
            groups = [
                {**group, "params": members, "use_fallback": by_adamw}
                for group in groups
                for by_adamw in (True, False)
                if (members := [parameter for parameter in group["params"] if (id(parameter) in ends) == by_adamw])
            ]
        if self.backbone_lr_scale == 1 and not self.backbone_freeze_epochs:
            return groups
        new = {id(parameter) for module in _new_modules(model) for parameter in module.parameters()}
        return [
            {**group, "params": members, **({} if chosen else self._backbone_settings(group, lr))}
            for group in groups
            for chosen in (True, False)
            if (members := [parameter for parameter in group["params"] if (id(parameter) in new) == chosen])
        ]

    def _other_groups(self, others: Mapping[str, nn.Module], lr_scales: Mapping[str, float]) -> list[dict[str, Any]]:
        flag = {"use_fallback": True} if self.adamw_first_last else {}
        return [
            {**group, **flag, **({"lr_scale": lr_scales[name]} if name in lr_scales else {})}
            for name, module in others.items()
            for group in param_groups_weight_decay(module, self.weight_decay)
            if group["params"]
        ]

    def _backbone_settings(self, group: dict[str, Any], lr: float) -> dict[str, Any]:
        """Return the settings of a group of the backbone's parameters; `freeze_epochs` is read by the training."""
        scaled = {"lr": lr * self.backbone_lr_scale}
        if self.scale_min_lr:  # timm's schedules multiply every learning rate by it
            scaled = {"lr_scale": group.get("lr_scale", 1.0) * self.backbone_lr_scale}
        return {**scaled, "freeze_epochs": self.backbone_freeze_epochs}

    def describe(self, effective_batch: int) -> str:
        """Return one line for the log, so that a wrong effective batch size, a common mistake, is easy to spot."""
        lr = f"lr {self.scaled_lr(effective_batch):.3g}"
        if self.lr_scaling != "none":
            lr += f" ({self.lr:g}, scaled {self.lr_scaling} from batch {self.lr_reference_batch})"
        return f"{self.name}: {lr}, weight decay {self.weight_decay:g}, effective batch {effective_batch}"


def _fuse(optimizer: Any) -> None:
    """Update all parameters by a few kernels, in place, if the optimiser can."""
    update_at_once(optimizer)
    base = getattr(optimizer, "_base_optimizer", optimizer)
    parameters = [parameter for group in base.param_groups for parameter in group["params"]]
    if type(base) in (torch.optim.Adam, torch.optim.AdamW) and all(p.is_floating_point() for p in parameters):
        for group in base.param_groups:
            group.update(fused=True, foreach=False)


def _new_modules(model: Any) -> list[nn.Module]:
    """Return the modules to train at the full learning rate: those that the model declares, or its classifiers."""
    if declared := getattr(model, "new_modules", ()):
        return [model.get_submodule(name) for name in declared]
    heads = model.get_classifier()
    classifiers = [*(heads if isinstance(heads, tuple) else (heads,)), getattr(model, "aux_head", None)]
    return [head for head in classifiers if head is not None]
