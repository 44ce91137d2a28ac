"""Checks that what the training scripts have in common is the same to the letter, function by function.

    python scripts/dev/compare_recipes.py [FOLDER]

A function that makes a family, or that some families don't have, is on one of the two lists below. Exit
code 1 if another one differs: a diff is printed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAY_DIFFER = {  # what makes a family
    *("add_family_args", "draw_noise", "compute_loss", "encode_prompts", "join_embeds", "negative_embeds"),
    *("check_base", "idle_layers", "token_encoders"),
}
MAY_BE_ABSENT = {"draw_level", "position_ids", "snr_weight"}  # not all families have these


def functions_of(recipe: Path) -> dict[str, str]:
    """{name: source} of a script's functions."""
    source = recipe.read_text(encoding="utf-8")
    lines = source.splitlines()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in functions}


def compare(recipes: list[Path]) -> list[str]:
    """Lines that say what differs between the recipes and should not; the first one is the reference."""
    functions = {recipe.name: functions_of(recipe) for recipe in recipes}
    lines = []
    for name in dict.fromkeys(name for sources in functions.values() for name in sources):
        with_it = {recipe: sources[name] for recipe, sources in functions.items() if name in sources}
        if name not in MAY_BE_ABSENT and len(with_it) < len(recipes):
            without = [recipe for recipe in functions if recipe not in with_it]
            lines.append(f"{name}: not in {', '.join(without)}")
        if name in MAY_DIFFER:
            continue
        (first, text), *others = with_it.items()
        for other, other_text in others:
            diff = difflib.unified_diff(text.splitlines(), other_text.splitlines(), first, other, lineterm="")
            lines += [f"{name} differs:", *diff] if text != other_text else []
    return lines


def main(argv: list[str] | None = None) -> int:
    """Compares; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Checks that the training scripts' common functions are equal."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="folder of the scripts")
    args = parser.parse_args(argv)
    recipes = sorted(args.folder.glob("train_*.py"))
    if len(recipes) < 2:
        print(f"compare_recipes.py: error: fewer than two training scripts in {args.folder}", file=sys.stderr)
        return 2
    if lines := compare(recipes):
        print("\n".join(lines))
        return 1
    print(f"the common functions of {len(recipes)} training scripts are the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
