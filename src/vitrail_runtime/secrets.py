"""Keep secrets, which come from environment variables, out of files, logs and servers."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # shorter values are likely to be ordinary words
Tree = TypeVar("Tree")


def redacted(tree: Tree) -> Tree:
    """Replace the value of each secret by `${oc.env:...}` in a text, or in dicts and lists of texts.

    Secrets are environment variables with KEY, TOKEN, SECRET, PASSW or CREDENTIAL in their names. A redacted config
    reads them from the environment again when it is used.
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
    """Formatter that redacts secrets in the lines of another formatter."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, without secrets."""
        return redacted(self.inner.format(record))


def redact_logs() -> None:
    """Redact secrets in everything that is logged from now on."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, RedactingFormatter):
            handler.setFormatter(RedactingFormatter(handler.formatter or logging.Formatter()))


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Redact secrets in `sys.argv` within the block, for packages that store the command line, such as W&B."""
    before = sys.argv
    sys.argv = redacted(list(before))
    try:
        yield
    finally:
        sys.argv = before
