"""Compare the classes that a network was trained for with those of the data."""

from collections.abc import Sequence

from vitrail.errors import ConfigError


def describe_difference(recorded: Sequence[str], now: Sequence[str]) -> str:
    """Describe how the data's classes `now` differ from the `recorded` ones of a checkpoint."""
    gone = [name for name in recorded if name not in set(now)]
    new = [name for name in now if name not in set(recorded)]
    if not gone and not new:
        index = next(number for number, pair in enumerate(zip(recorded, now, strict=True)) if pair[0] != pair[1])
        return f"the classes are in another order (class {index} was {recorded[index]} and is {now[index]})"
    parts = [f"{len(names)} {what} ({_first(names)})" for names, what in ((gone, "missing"), (new, "new")) if names]
    return f"the data's classes are not the checkpoint's: {', '.join(parts)}"


def require_same(recorded: Sequence[str] | None, now: Sequence[str], source: str, advice: str) -> None:
    """Require the same classes in the same order.

    Args:
        recorded: class names of a checkpoint; None if it records none.
        now: class names of the data.
        source: start of the error message: the config key and its value.
        advice: what to do instead.

    Raises:
        ConfigError: names or order differ.
    """
    if recorded is not None and list(recorded) != list(now):
        raise ConfigError(f"{source}: {describe_difference(recorded, now)}; {advice}.")


def _first(names: Sequence[str]) -> str:
    return f"{names[0]}, ..." if len(names) > 1 else names[0]
