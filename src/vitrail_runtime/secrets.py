"""Secrets come from the environment, and never reach a file, a log or a server.

Beside the plugins because the programs need it before anything heavy is imported.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # shorter values are words that could stand anywhere
Tree = TypeVar("Tree")


def redacted(tree: Tree) -> Tree:
    """Text, or dicts and lists of it, in which the value of each secret variable is replaced by `${oc.env:...}`.

    Secret are variables of the environment with KEY, TOKEN, SECRET, PASSW or CREDENTIAL in their names. A config that
    is written so reads the secret again when it is used.
    """
    secrets = {value: name for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    return _replace(tree, sorted(secrets.items(), key=lambda item: -len(item[0])))


def _replace(tree: Any, secrets: list[tuple[str, str]]) -> Any:
    if isinstance(tree, dict):
        return {key: _replace(value, secrets) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replace(value, secrets) for value in tree]
    if isinstance(tree, str):
        for value, name in secrets:
            tree = tree.replace(value, f"${{oc.env:{name}}}")
    return tree


class RedactingFormatter(logging.Formatter):
    """Another formatter's lines without secrets."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redacted(self.inner.format(record))


def redact_logs() -> None:
    """Keep secrets out of everything that is logged from here on."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, RedactingFormatter):
            handler.setFormatter(RedactingFormatter(handler.formatter or logging.Formatter()))


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Hide secrets in `sys.argv` from what stores the command line, as W&B does."""
    before = sys.argv
    sys.argv = redacted(list(before))
    try:
        yield
    finally:
        sys.argv = before
