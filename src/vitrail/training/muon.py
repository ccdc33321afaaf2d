"""timm's Muon and AdaMuon (Jordan et al., kellerjordan.github.io/posts/muon; Si et al., arXiv:2507.11005).

They orthogonalise the momentum of matrices and update everything else by AdamW. This file decides which parameters are
the first layer and the classifiers, says which parameters go where, and lets both work on sharded tensors.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import Muon
from timm.optim.muon import _is_suitable_for_muon
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.overrides import TorchFunctionMode

from vitrail.checkpoints.fitting import head_names


def first_and_last(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of the first layer and of the classifiers.

    The first layer is what the model's `group_matcher` (timm) calls its stem, else the first matrix.
    """
    named = dict(model.named_parameters())
    heads = tuple(f"{name}." for name in head_names(model))
    if hasattr(model, "group_matcher"):
        first = group_parameters(model, model.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
        order = {name: group for name, group in first.items() if name in named}
        stem = {name for name, group in order.items() if group == min(order.values())}
    else:
        hidden = [name for name, parameter in named.items() if parameter.ndim > 1 and not name.startswith(heads)]
        stem = set(hidden[:1])
    return {id(parameter) for name, parameter in named.items() if name in stem or name.startswith(heads)}


def _muon_of(optimizer: Any) -> Muon | None:
    """Return timm's Muon, also inside Lookahead; None for any other optimiser."""
    base = getattr(optimizer, "_base_optimizer", optimizer)
    return base if isinstance(base, Muon) else None


def describe_routing(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> str | None:
    """Return which parameters Muon updates and which AdamW, as one line for the log; None without Muon.

    Args:
        optimizer: the optimiser.
        modules: modules that it trains, by the prefix of their parameters' names.
    """
    muon = _muon_of(optimizer)
    if muon is None:
        return None
    names = {
        id(parameter): f"{prefix}{name}"
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    routed: dict[bool, dict[str, int]] = {True: {}, False: {}}  # number of parameters by pattern of their names
    for group in muon.param_groups:
        for parameter in group["params"]:
            by_muon = not group.get("use_fallback", False) and bool(_is_suitable_for_muon(parameter))
            name = re.sub(r"\b\d+\b", "*", names[id(parameter)])
            pattern = name if parameter.ndim > 1 else "biases, norms and scales"
            routed[by_muon][pattern] = routed[by_muon].get(pattern, 0) + parameter.numel()
    adaptive = "NAdamW" if muon.param_groups[0]["nesterov"] else "AdamW"
    algorithm = {"adamuon": "AdaMuon"}.get(muon.param_groups[0]["algo"], "Muon")
    return "; ".join(
        f"{method}: {', '.join(sorted(patterns)) or 'nothing'} ({sum(patterns.values()) / 1e6:.2f} M parameters)"
        for method, patterns in ((algorithm, routed[True]), (adaptive, routed[False]))
    )


class _WholeNorms(TorchFunctionMode):
    """Mode in which norms of sharded tensors are complete on every process.

    timm changes them in place, which PyTorch refuses for partial results.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.norm and isinstance(result, DTensor):
            return result.redistribute(placements=[Replicate()] * result.device_mesh.ndim)
        return result


class _ShardedMuon(Muon):
    """timm's Muon and AdaMuon, for parameters that FSDP may have sharded."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once."""
        with _WholeNorms():
            return super().step(closure)


def allow_shards(optimizer: Any) -> bool:
    """Let timm's Muon work on sharded parameters, in place; return whether the optimiser is a Muon."""
    muon = _muon_of(optimizer)
    if muon is not None:
        muon.__class__ = _ShardedMuon
    return muon is not None
