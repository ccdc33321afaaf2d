"""Interface of objectives: a module that maps outputs and targets to losses, and declares what it needs.

Known needs:

- `token_targets`: `Targets.tokens`, from label maps
- `teacher_logits`, `teacher_features`: the fields of that name, from a teacher (logits also from label maps)
- `outputs.<name>`: an output of the backbone, such as `outputs.tokens`, `outputs.distill` or any other

Training does not start if a need is not met; the error names it. `Targets.cls` and `Outputs.cls` are always available.

Shapes: B images.
"""

from torch import Tensor, nn

from vitrail.types import Outputs, Targets

TARGET_NEEDS = ("token_targets", "teacher_logits", "teacher_features")


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
    return frozenset(getattr(objective, "needs", ()))


def uses_of(objective: nn.Module) -> frozenset[str]:
    """Return everything that an objective can use: its needs and its optional inputs."""
    return needs_of(objective) | frozenset(getattr(objective, "optional", ()))


def passes_of(objective: nn.Module) -> int:
    """Return the forward passes per image and step."""
    return int(getattr(objective, "passes", 1))
