"""The training scripts as files: flags that are used, functions in common, order, sizes."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT
from toy_parts import arguments

from scripts.dev import compare_recipes

pytestmark = pytest.mark.unit

LIBRARY = ROOT / "lora_training"
RECIPES = [family.script for family in FAMILIES.values()]
FLAG_TABLES = ("flags.py", "rules.py", "checks.py", "other_trainers.py", "resume_flags.py")
OTHER_ROOMS = ("prepare", "inference", "launch")  # of the library: no training reads them


def names_in(file: Path, except_for: tuple[str, ...] = ()) -> set[str]:
    """Attributes and texts in a Python file, but for those of some functions and tables."""
    body = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names = {getattr(target, "name", getattr(target, "id", None)) for target in targets}
        body += [] if names & set(except_for) else [node]
    nodes = [node for part in body for node in ast.walk(part)]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return attributes | {value for value in constants if isinstance(value, str)}


@functools.cache
def names_in_library() -> set[str]:
    """Attributes and texts in what trains of the library, but for the tables of flags."""
    files = [file for file in LIBRARY.rglob("*.py") if file.name not in FLAG_TABLES]
    rooms = {file: file.relative_to(LIBRARY).parts[0] for file in files}
    return set().union(*(names_in(file) for file in files if rooms[file] not in OTHER_ROOMS))


def test_every_flag_is_used(script):
    """Every flag's value is read outside the parser and its rules: none is parsed and ignored."""
    tables = ("add_family_args", "FAMILY_RULES", "FOREIGN_FLAGS")
    used = names_in_library() | names_in(ROOT / script.FAMILY.training_script, tables)
    composed = {f"prodigy_{name}" for name in ("decouple", "use_bias_correction", "safeguard_warmup")}
    needless = {"local_rank", "config", "cache_text_embeddings"}  # the last: what it asks for is always done
    unused = set(vars(arguments(script))) - used
    assert not unused - composed - needless


def test_common_functions_are_the_same(capsys):
    assert compare_recipes.main([]) == 0, capsys.readouterr().out


RECIPE = '''"""A recipe."""


def compute_loss():
    return {loss}


def train():
    return {steps}
'''


@pytest.mark.parametrize(
    ("texts", "code", "message"),
    [
        ([RECIPE.format(loss=1, steps=3), RECIPE.format(loss=2, steps=3)], 0, "are the same"),
        ([RECIPE.format(loss=1, steps=3), RECIPE.format(loss=1, steps=4)], 1, "train differs:"),
        (
            [RECIPE.format(loss=1, steps=3), RECIPE.split("\n\n\ndef train")[0].format(loss=1)],
            1,
            "train: not in",
        ),
        ([RECIPE.format(loss=1, steps=3)], 2, "fewer than two training scripts"),
    ],
)
def test_functions_that_differ_are_named(tmp_path, capsys, texts, code, message):
    for number, text in enumerate(texts):
        (tmp_path / f"train_{number}.py").write_text(text)
    assert compare_recipes.main([str(tmp_path)]) == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert ("+    return 4" in printed.out) == ("differs" in message)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_from_the_top(name):
    """What is the family's own stands first; then come the run in order, the loop, and one step of it."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    lines = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    story = ("add_family_args", "draw_noise", "compute_loss", "encode_prompts", "check_base", "draw_caption")
    story += (
        "load_text",
        "preservation_loss",
        "main",
        "execute",
        "load_data",
        "train",
        "backward",
        "validate",
    )
    assert [lines[function] for function in story] == sorted(lines[function] for function in story)
    assert lines["compute_loss"] < 200


def test_files_are_no_longer_than_a_person_reads():
    limits = dict.fromkeys((ROOT / name for name in RECIPES), 750) | {ROOT / "infer_lora.py": 500}
    limits |= dict.fromkeys(LIBRARY.rglob("*.py"), 400)
    for file, limit in limits.items():
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= limit, file
        assert all(len(line) <= 110 for line in lines), file


@pytest.mark.parametrize("name", [*RECIPES, "infer_lora.py"])
def test_uv_run_takes_the_projects_environment(name):
    """With a PEP 723 header it made another one, with a second torch, and left uv.lock out."""
    assert "# /// script" not in (ROOT / name).read_text(encoding="utf-8")
