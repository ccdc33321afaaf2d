"""docs/recipes.md says what the experiments and the results say."""

import csv
import runpy

from programs import PROJECT

recipes = runpy.run_path(str(PROJECT / "benchmarks" / "recipes.py"))


def test_page__is_the_one_that_is_generated():
    assert (PROJECT / "docs" / "recipes.md").read_text() == recipes["document"](), "run make recipes"


def test_heads__name_all_that_is_promised():
    for path in (PROJECT / "conf" / "experiment").glob("*.yaml"):
        head = recipes["head"](path)
        assert head["Command"].startswith(f"python src/train.py experiment={path.stem}")
        assert head["Hardware"]
        ours = " ours" in head["title"] or "Ours" in head["notes"] or "published result" in head["title"]
        assert ours or "Different from the official run" in head or "as lvvit" in head["title"], path.stem


def test_results__are_numbers_with_a_source_and_of_experiments():
    with (PROJECT / "results" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml")} | {"digits"}
    for row in rows:
        assert row["experiment"] in names
        assert 50 < float(row["value"]) <= 100
        assert row["source"].startswith("published: arXiv:") or (row["source"] == "measured" and row["commit"])
    assert len({(row["experiment"], row["metric"], row["source"]) for row in rows}) == len(rows)
