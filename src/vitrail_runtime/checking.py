"""Check arguments that a config can set: `checked` compares them with the annotations of a constructor.

Only plain values are checked (numbers, text, lists, mappings, paths); annotations with any other class are skipped.
A range is part of an annotation: `Annotated[int, Range(ge=1)]`, or one of the names below.
"""

import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from vitrail_runtime.errors import ArgumentError

T = TypeVar("T")


class Range(NamedTuple):
    """Bounds of a number: at least `ge`, above `gt`, at most `le`, below `lt`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: object) -> bool:
        """Return whether `value` is within the bounds."""
        number: Any = value
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    def __str__(self) -> str:
        words = ((self.ge, "at least"), (self.gt, "above"), (self.le, "at most"), (self.lt, "below"))
        return " and ".join(f"{word} {bound:g}" for bound, word in words if bound is not None)


class Length(NamedTuple):
    """Number of items of a list."""

    items: int


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
"""A value in [0, 1]."""
Rate = Annotated[float, Range(ge=0, lt=1)]
"""A value in [0, 1)."""
RGB = Annotated[Sequence[float], Length(3)]
"""One value for each of R, G and B."""


def checked(target: T) -> T:
    """Decorate a class or function so that its arguments are checked against their annotations.

    Raises (when called):
        ArgumentError: an argument has another type, or lies outside its range.
    """
    is_class = isinstance(target, type)
    function: Any = target.__init__ if is_class else target  # type: ignore[misc]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function, args, kwargs)
        return function(*args, **kwargs)

    if is_class:
        target.__init__ = wrapper  # type: ignore[misc]
        return target
    return wrapper  # type: ignore[return-value]


def check_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a call against the annotations; missing and unknown ones are left to the call.

    Raises:
        ArgumentError: an argument has another type, or lies outside its range; the message names it.
    """
    try:
        signature = inspect.signature(function)
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return
    hints = _hints(vars(function).get("__init__", function) if isinstance(function, type) else function)
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        values = value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        if name in hints and kind is not inspect.Parameter.VAR_POSITIONAL:
            for key, item in values.items():
                check_value(key, item, hints[name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check one value against an annotation.

    Raises:
        ArgumentError: the value does not fit.
    """
    if _is_plain(hint) and not _fits(value, hint):
        raise ArgumentError(name, value, f"must be {_describe(hint)}")


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations of other packages may not be importable
        return {}


def _is_plain(hint: Any) -> bool:
    """Return whether an annotation consists of plain types."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return True
    if origin is Annotated:
        return _is_plain(arguments[0])
    if origin is None:
        return hint in (int, float, str, bool, type(None), Path)
    if origin in (Union, types.UnionType, list, tuple, dict) or issubclass(origin, Iterable):
        return all(_is_plain(argument) for argument in arguments if argument is not ...)
    return False


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(_within(value, bound) for bound in arguments[1:])
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if origin is not None:
        is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        return is_list and all(_fits(item, arguments[0]) for item in value)
    return _is_a(value, hint)


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    if kind is Path:
        return isinstance(value, (str, os.PathLike))
    return isinstance(value, kind)


def _within(value: Any, bound: Any) -> bool:
    if isinstance(bound, Length):
        return len(value) == bound.items
    return not isinstance(bound, Range) or value in bound


_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null", Path: "a path"}
_PLURALS = {int: "integers", float: "numbers", str: "texts", Path: "paths"}


def _describe(hint: Any, plural: bool = False) -> str:
    """Return an annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is Annotated:
        length = next((bound.items for bound in arguments[1:] if isinstance(bound, Length)), None)
        ranges = "".join(
            f" of {bound}" if bound.ge is not None else f" {bound}"
            for bound in arguments[1:]
            if isinstance(bound, Range)
        )
        words = _describe(arguments[0], plural)
        return (words if length is None else words.replace("a list of", f"a list of {length}", 1)) + ranges
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(argument) for argument in arguments))
    if origin is not None and issubclass(origin, Mapping):
        return "mappings" if plural else "a mapping"
    if origin is not None:
        return f"a list of {_describe(arguments[0], plural=True)}"
    return _PLURALS.get(hint, _WORDS[hint]) if plural else _WORDS[hint]
