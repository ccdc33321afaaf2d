"""Licences of published weights, as timm records them."""

from collections.abc import Mapping
from typing import Any

import timm

PERMISSIVE = frozenset({"apache-2.0", "mit", "bsd-3-clause", "bsd-3-clause-clear"})
"""Licences that allow any use of weights derived from theirs, with attribution."""


def licence_of(name: str) -> str | None:
    """Return the licence of the published weights of timm's backbone `name` (with or without tag); None if unknown."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    return None if cfg is None else cfg.license


def inherited_licence(config: Mapping[str, Any]) -> str | None:
    """Return the licence of the weights from which a run's config starts; None if it starts from none.

    A file in `init_from` has no recorded licence. It may contain the published weights, so their licence is returned if
    it restricts the use of what is derived from them.
    """
    node = config.get("model") or {}
    licence = licence_of(str(node.get("name") or ""))
    if node.get("pretrained") or (config.get("init_from") and licence not in PERMISSIVE):
        return licence
    return None
