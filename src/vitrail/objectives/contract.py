"""Interface of objectives: a module that maps outputs and targets to losses, and declares what it needs.

Known needs:

- `token_targets`: `Targets.tokens`, from label maps
- `teacher_logits`, `teacher_features`: the fields of that name, from a teacher (logits also from label maps)
- `teacher_heads`: the teacher's class and token logits, separately
- `outputs.<name>`: an output of the backbone, such as `outputs.tokens`, `outputs.distill` or any other

Training does not start if a need is not met; the error names it. `Targets.cls` and `Outputs.cls` are always available.
An objective has no parameters of its own, because only the backbone's are trained. One that contains another declares
its needs too.

Shapes: B images.
"""

from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.types import Outputs, Targets

TARGET_NEEDS = ("token_targets", "teacher_logits", "teacher_features", "teacher_heads")


class Objective(nn.Module):
    """Base class of objectives. It is optional: any module with these attributes works.

    Attributes:
        needs: inputs that must be available.
        optional: inputs that are used if they are available.
        passes: forward passes per image and step. Outputs of all passes are concatenated, (passes * B, ...); targets
            have B rows.
    """

    needs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    passes: int = 1

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


def passes_of(objective: nn.Module) -> int:
    """Return the forward passes per image and step."""
    return int(getattr(objective, "passes", 1))
