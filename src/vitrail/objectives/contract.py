"""What an objective is: a module that maps outputs and targets to losses, and declares what it needs for that.

Known needs:

- `token_targets`: `Targets.tokens`, from label maps
- `teacher_logits`, `teacher_features`: the fields of that name, from a teacher (logits also from label maps)
- `outputs.<name>`: an output of the backbone, such as `outputs.tokens`, `outputs.distill` or one of its own

A training refuses to start if a need is not met, and names it. `Targets.cls` and `Outputs.cls` are always there.
"""

from torch import Tensor, nn

from vitrail.types import Outputs, Targets

TARGET_NEEDS = ("token_targets", "teacher_logits", "teacher_features")


class Objective(nn.Module):
    """Base class of objectives. A class without this base works too: what counts is what it declares.

    Attributes:
        needs: what must be provided.
        optional: what is served if it is provided.
        passes: how often each image goes through the network in a step; the outputs of all passes come concatenated,
            (passes * B, ...), while the targets are of the B images.
    """

    needs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    passes: int = 1

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return scalar losses by name; `loss` is minimised, the others are logged."""
        raise NotImplementedError


def needs_of(objective: nn.Module) -> frozenset[str]:
    """Return what an objective declares as needed."""
    return frozenset(getattr(objective, "needs", ()))


def uses_of(objective: nn.Module) -> frozenset[str]:
    """Return what an objective reads if it is there: its needs, and what it declares as optional."""
    return needs_of(objective) | frozenset(getattr(objective, "optional", ()))


def passes_of(objective: nn.Module) -> int:
    """Return how often each image goes through the network in a step."""
    return int(getattr(objective, "passes", 1))
