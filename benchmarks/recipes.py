"""Write docs/recipes.md from the heads of conf/experiment/ and from results/results.csv: `make recipes`."""

import csv
import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
INTRODUCTION = """# Recipes

Made by `make recipes` from the heads of `conf/experiment/*.yaml` and from `results/results.csv`; edit those.

Hours are computed: multiply-accumulates x 6 x images x epochs, at 30 % of an A100's 312 TFLOP/s in bf16 (`plan=true`
shows it for your own hardware in other numbers of devices). Accuracies are published ones unless a row says measured.
"""


def head(path: Path) -> dict[str, str]:
    """The parts of an experiment's head: `title`, and what follows `Command:`, `Official:`, `Hardware:`, ..."""
    lines = [line[1:] for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.startswith("#")]
    joined: list[str] = []
    for line in lines:
        if line.startswith("   ") and joined:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip())
    parts = {"title": joined[0], "notes": ""}
    for line in joined[1:]:
        found = re.match(r"(Command|Official|Hardware|Different from the official run): (.*)", line)
        if found:
            parts[found[1]] = found[2]
        else:
            parts["notes"] = f"{parts['notes']} {line}".strip()
    return parts


def results() -> dict[str, list[dict[str, str]]]:
    """The rows of results.csv, by experiment."""
    found: dict[str, list[dict[str, str]]] = {}
    with (PROJECT / "results" / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["experiment"], []).append(row)
    return found


def document() -> str:
    """The whole page."""
    rows, parts = results(), [INTRODUCTION]
    for path in sorted((PROJECT / "conf" / "experiment").glob("*.yaml")):
        recipe = head(path)
        parts.append(f"## {path.stem}\n\n{recipe['title']}\n\n```bash\n{recipe['Command']}\n```\n")
        if "Official" in recipe:
            parts.append(f"- Official command: `{recipe['Official']}`")
        parts.append(f"- Hardware: {recipe['Hardware']}")
        if "Different from the official run" in recipe:
            parts.append(f"- Different from the official run: {recipe['Different from the official run']}")
        if recipe["notes"]:
            parts.append(f"- {recipe['notes']}")
        for row in rows.get(path.stem, []):
            where = f", {row['hardware']}, {row['seconds']} s, commit {row['commit']}" if row["seconds"] else ""
            parts.append(f"- `{row['metric']}` {row['value']} ({row['source']}{where})")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    (PROJECT / "docs" / "recipes.md").write_text(document(), encoding="utf-8")
