"""Arguments that a config can set are compared with their annotations."""

import inspect
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from hydra.utils import get_object

from vitrail.data import Augmentation
from vitrail.errors import ArgumentError
from vitrail.types import ImageSize, height_width
from vitrail_runtime.checking import (
    RGB,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Range,
    Rate,
    Share,
    check_value,
    checked,
)
from vitrail_runtime.project import CONF

NAN = float("nan")


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, [0, -3, np.int64(2)], [1.0, "1", True, None, NAN], "an integer"),
        (float, [0, 1.5, np.float32(1)], ["1", True, NAN, float("inf"), [1.0]], "a number"),
        (bool, [True, False], [0, 1, "true", None], "true or false"),
        (str, ["a", ""], [1, None, ["a"]], "text"),
        (str | None, ["a", None], [1], "text or null"),
        (Path | str, ["a", Path("a")], [1], "a path or text"),
        (Literal["a", "b"], ["a"], ["c", 1, None], "one of a, b"),
        (PositiveInt, [1], [0, -1, 1.5], "an integer of at least 1"),
        (NonNegativeInt, [0], [-1], "an integer of at least 0"),
        (Positive, [0.1], [0, -1], "a number above 0"),
        (NonNegative, [0, 2.5], [-3], "a number of at least 0"),
        (Share, [0, 1, 0.5], [1.1, -0.1], "a number of at least 0 and at most 1"),
        (Rate, [0, 0.99], [1], "a number of at least 0 and below 1"),
        (Annotated[float, Range(gt=0, le=1)], [1], [0], "a number above 0 and at most 1"),
        (RGB, [[0.5, 0.5, 0.5], (1, 2, 3)], [[0.5], "abc", 0.5, [1, 2, "3"]], "a list of 3 numbers"),
        (dict[str, float], [{"a": 1}], [{"a": "b"}, [1]], "a mapping"),
        (
            ImageSize,
            [32, [32, 64], (32, 64)],
            ["32x32", "64", [3, 64, 64], [32], 0, 64.0, [0, 3]],
            "an integer of at least 1 or a list of 2 integers of at least 1",
        ),
    ],
)
def test_value__type_and_range(hint, good, bad, words):
    for value in good:
        check_value("key", value, hint)
    for value in bad:
        with pytest.raises(ArgumentError) as error:
            check_value("key", value, hint)
        assert str(error.value) == f"key={value}: must be {words}."


def test_checked__functions_and_classes_and_what_is_left_to_them():
    @checked
    def build(count: PositiveInt, thing: np.ndarray | None = None, **options: float) -> int:
        return count

    assert build(2, np.zeros(1), anything=1.0) == 2
    with pytest.raises(ArgumentError, match=r"^anything=x: must be a number\.$"):
        build(2, anything="x")
    assert build.__name__ == "build"
    with pytest.raises(ArgumentError, match=r"^count=0: must be an integer of at least 1\.$"):
        build(0)
    with pytest.raises(TypeError, match="missing 1 required"):
        build()


def targets():
    """Return all targets of vitrail and its plugins that configs name."""
    found = set()
    for file in CONF.rglob("*.yaml"):
        for line in file.read_text().splitlines():
            name = line.partition("_target_:")[2].split("#")[0].strip()
            found |= {name} if name.startswith(("vitrail.", "hydra_plugins.")) else set()
    return sorted(found)


@pytest.mark.parametrize("name", targets())
def test_targets_of_configs__check_their_arguments(name):
    target = get_object(name)
    function = target.__init__ if isinstance(target, type) else target
    takes_arguments = set(inspect.signature(target).parameters) - {"args", "kwargs"}
    assert hasattr(function, "__wrapped__") or not takes_arguments


@pytest.mark.parametrize("size", ["64", "32x32", [3, 64, 64], 0, None])
def test_image_size__is_never_guessed(size):
    with pytest.raises(ArgumentError, match="image_size="):
        height_width(size)


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m10-n8",
        "rand-m9-mstd0.5-inc1-n3-p0.6",
        "rand-m9-mmax15-tweights",
        "original",
        "v0r-mstd0.5",
        "3a",
        "augmix-m5-w4-d2",
    ],
)
def test_policy__of_timm(policy):
    assert Augmentation(auto_augment=policy).auto_augment == policy


@pytest.mark.parametrize(
    "policy", ["rand-foo", "rand-m", "rand-m9-", "randm9", "original-m9", "tv", "rand-m9-w0", "3aa"]
)
def test_policy__misspelt(policy):
    with pytest.raises(ArgumentError, match=rf"^auto_augment={policy}: not a policy of timm"):
        Augmentation(auto_augment=policy)
