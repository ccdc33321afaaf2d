"""Packages that import their public names at the first use offer all of them, and nothing else."""

import importlib
import pkgutil

import pytest

from programs import run_python

PACKAGES = (
    *("vitrail", "vitrail.data", "vitrail.data.render", "vitrail.data.sources", "vitrail.models"),
    *("vitrail.objectives", "vitrail.reporting", "vitrail.runs", "vitrail.runs.loggers", "vitrail.training"),
)


@pytest.mark.parametrize("package", PACKAGES)
def test_lazy_names__are_those_of_all(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        found = getattr(module, name)
        assert found is vars(module)[name]  # which later uses find at once
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'absent'"):
        module.absent  # noqa: B018


@pytest.mark.parametrize("package", [package for package in PACKAGES if package != "vitrail.runs.loggers"])
def test_lazy_names__differ_from_the_names_of_modules(package):
    """A module that is imported becomes an attribute of its package, and would hide a name."""
    module = importlib.import_module(package)
    modules = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert modules.intersection(module.__all__) <= ({"models"} if package == "vitrail" else set())


def test_lazy_names__import_only_what_is_asked_for(tmp_path):
    code = (
        "import sys, vitrail.objectives as objectives\n"
        "def count(): return sum(name.startswith('vitrail.objectives.') for name in sys.modules)\n"
        "print(count(), objectives.CosubLoss.__module__, 'vitrail.objectives.evo_vit' in sys.modules)\n"
        "from vitrail.objectives import *\n"
        "print(EvoViTLoss.__module__, objectives.token_labeling.__name__)\n"
    )
    result = run_python("-c", code, folder=tmp_path)
    lines = ["0 vitrail.objectives.cosub False", "vitrail.objectives.evo_vit vitrail.objectives.token_labeling"]
    assert result.stdout.splitlines() == lines, result.stderr
