"""docs/recipes.md agrees with the experiments and the results."""

import csv
import re
import runpy

from programs import PROJECT

recipes = runpy.run_path(str(PROJECT / "benchmarks" / "recipes.py"))


def test_page__is_up_to_date():
    assert (PROJECT / "docs" / "recipes.md").read_text() == recipes["document"](), "run make recipes"


def test_heads__contain_command_hardware_and_the_official_command():
    """The header of a recipe that is not ours has the official command, or says that none is published."""
    heads = {path.stem: recipes["head"](path) for path in (PROJECT / "conf" / "experiment").glob("*.yaml")}
    for name, head in heads.items():
        assert head["Command"].startswith(f"python src/train.py experiment={name}")
        assert head["Hardware"]
        ours = " ours" in head["title"] or "Ours" in head["notes"] or "published result" in head["title"]
        inherited = "as lvvit" in head["title"] or "as seg_lvvit" in head["title"]
        assert ours or inherited or "Different from the official run" in head, name
        assert "Official" in head or ours, name
        if base := re.match(r"as (\w+)", head.get("Official", "")):
            assert "Official" in heads[base[1]], name


def test_results__have_a_source_and_a_known_experiment():
    with (PROJECT / "results" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml")} | {"digits"}
    for row in rows:
        assert row["experiment"] in names
        assert 50 < float(row["value"]) <= 100
        assert row["source"].startswith("published: arXiv:") or (row["source"] == "measured" and row["commit"])
    assert len({(row["experiment"], row["metric"], row["source"]) for row in rows}) == len(rows)
