"""Interface of objectives: a module that maps outputs and targets to losses, and declares what it needs.

Known needs:

- `token_targets`: `Targets.tokens`, from label maps
- `teacher_logits`, `teacher_features`: the fields of that name, from a teacher (logits also from label maps)
- `masks`: class indices (B, H, W) in `Targets.cls`, from data with masks
- `teacher_heads`: the teacher's class and token logits, separately
- `outputs.<name>`: an output of the backbone, such as `outputs.tokens`, `outputs.distill` or any other

Training does not start if a need is not met; the error names it. `Targets.cls` and `Outputs.cls` are always available.
An objective that contains another declares its needs too.

An objective may have modules of its own to train, such as a projection between two widths: it names them in `trained`
and builds them in `build_parts`. They are optimised, sharded and saved in checkpoints with the backbone. They have no
EMA weights, and exports do not contain them.

Shapes: B images.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.types import Outputs, Targets

TARGET_NEEDS = ("token_targets", "teacher_logits", "teacher_features", "teacher_heads", "masks")


class Objective(nn.Module):
    """Base class of objectives. It is optional: any module with these attributes works.

    Attributes:
        needs: inputs that must be available.
        optional: inputs that are used if they are available.
        passes: forward passes per image and step. Outputs of all passes are concatenated, (passes * B, ...); targets
            have B rows.
        trained: names of its modules that are trained with the backbone.
    """

    needs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    passes: int = 1
    trained: frozenset[str] = frozenset()

    def build_parts(self, widths: Mapping[str, int]) -> None:
        """Build the modules named in `trained`; called once, before the optimiser is built.

        Args:
            widths: channels of `outputs.features` and `teacher_features`, if the objective needs them.
        """

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return scalar losses by name; `loss` is minimised, the others are logged."""
        raise NotImplementedError


def needs_of(objective: nn.Module) -> frozenset[str]:
    """Return the needs that an objective declares."""
    return _names(objective, "needs")


def uses_of(objective: nn.Module) -> frozenset[str]:
    """Return everything that an objective can use: its needs and its optional inputs."""
    return needs_of(objective) | optional_of(objective)


def optional_of(objective: nn.Module) -> frozenset[str]:
    """Return the optional inputs that an objective declares."""
    return _names(objective, "optional")


def _names(objective: nn.Module, attribute: str) -> frozenset[str]:
    """Return a declared set of names; a string is one name."""
    declared = getattr(objective, attribute, ())
    return frozenset({declared} if isinstance(declared, str) else declared)


def outputs_for(objective: nn.Module, outputs: Outputs) -> Outputs:
    """Return the class logits and those of the other outputs that a wrapped objective uses."""
    uses = uses_of(objective)
    return Outputs(
        outputs.cls,
        outputs.tokens if "outputs.tokens" in uses else None,
        outputs.distill if "outputs.distill" in uses else None,
        outputs.extras,
    )


def check_losses(losses: object, objective: nn.Module) -> None:
    """Check what an objective returned.

    Raises:
        ConfigError: it is not a dict of scalar tensors with the key `loss`.
    """
    name = type(objective).__name__
    if not isinstance(losses, dict) or "loss" not in losses:
        what = f"a dict of {', '.join(map(str, losses))}" if isinstance(losses, dict) else type(losses).__name__
        raise ConfigError(f"objective: {name} returns {what or 'nothing'}; it must return a dict with the key loss.")
    for key, value in losses.items():
        if not isinstance(value, Tensor) or value.ndim:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"objective: {name} returns {what} as {key}; it must be a scalar tensor.")


def trained_parts(objective: nn.Module) -> dict[str, nn.Module]:
    """Return the trained modules of an objective and of the objectives inside it, by their dotted names."""
    parts = {}
    for prefix, module in objective.named_modules():
        for name in sorted(_names(module, "trained")):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                parts[f"{prefix}.{name}".lstrip(".")] = part
    return parts


def build_parts(objective: nn.Module, widths: Mapping[str, int]) -> None:
    """Build the trained modules of an objective and of the objectives inside it."""
    for module in list(objective.modules()):
        if _names(module, "trained"):
            module.build_parts(widths)  # type: ignore[operator]


class FeatureWidths(dict[str, int]):
    """Channels of the features of a backbone and its teacher, looked up when an objective asks for them."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__()
        self._owners = {"outputs.features": model, "teacher_features": teacher}

    def __missing__(self, name: str) -> int:
        owner = self._owners.get(name)
        width = getattr(owner, "num_features", None)
        if width is None:
            what = "the teacher" if name == "teacher_features" else type(owner).__name__
            raise ConfigError(f"objective: the width of {name} is not known; {what} needs an attribute num_features.")
        return int(width)


def passes_of(objective: nn.Module) -> int:
    """Return the forward passes per image and step."""
    return int(getattr(objective, "passes", 1))
