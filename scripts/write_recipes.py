"""Write the experiment files from the tables of recipes in src/transfer/recipes.py and src/transfer/experiments.py, and
the recipes of backbones and data sets.

python scripts/write_recipes.py            write configs/experiment/<table>/ of each, and configs/recipe/
python scripts/write_recipes.py --check    say which files differ, and write nothing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from transfer.experiments import TABLES, experiments
from transfer.recipes import Recipe, pairs

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = CONFIGS / "experiment"


def text(recipe: Recipe) -> str:
    """Return the content of one experiment file."""
    if recipe.published is None:
        figure = "not published here"
    else:
        figure = (
            f"published: {recipe.published.accuracy[recipe.data]}%, {recipe.published.memory_mb:g} MB by formula, "
            f"batch 8 ({recipe.row.published}, TinyTL, arXiv 2007.11622, table 2, mean of 5 runs)"
        )
    return _content(recipe, f"experiment={recipe.name}", f"# {recipe.row.label}; {figure}")


def pair_text(recipe: Recipe) -> str:
    """Return the content of the file of a backbone and a data set."""
    model, data = recipe.name.split("/")
    return _content(recipe, f"model={model} data={data}")


def _content(recipe: Recipe, arguments: str, *about: str) -> str:
    lines = [
        "# @package _global_",
        f"# python train.py {arguments}",
        *about,
        f"# settings: {recipe.origin}",
        "# written by scripts/write_recipes.py",
        "defaults:",
        *(f"  - override /{group}: {name}" for group, name in recipe.groups.items()),
        "",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(dict(recipe.settings), sort_keys=False)


def files() -> dict[Path, str]:
    """Return path and content of every file."""
    written = {EXPERIMENTS / f"{recipe.name}.yaml": text(recipe) for table in TABLES for recipe in experiments(table)}
    return written | {CONFIGS / "recipe" / f"{recipe.name}.yaml": pair_text(recipe) for recipe in pairs()}


def differences(wanted: dict[Path, str]) -> list[Path]:
    """Return the files that are missing, hold something else, or should not be there."""
    there = {path for table in TABLES for path in (EXPERIMENTS / table).glob("*.yaml")}
    there |= set((CONFIGS / "recipe").glob("*/*.yaml"))
    differing = {path for path, content in wanted.items() if path not in there or path.read_text() != content}
    return sorted(differing | (there - wanted.keys()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say what differs and write nothing")
    options = parser.parse_args(arguments)
    wanted = files()
    changed = differences(wanted)
    if options.check:
        print(*changed, sep="\n")
        return 1 if changed else 0
    for path in changed:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    print(f"{len(wanted)} files, {len(changed)} of them written or removed now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
