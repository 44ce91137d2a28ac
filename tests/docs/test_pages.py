"""README and docs/: links lead somewhere, commands have flags that there are."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from lora_training.families import FAMILIES
from lora_training.launch.arguments import MODEL_FLAGS, take_flags
from lora_training.queue.jobs import read_queue

pytestmark = pytest.mark.unit
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
TRAINING_SCRIPTS = {family.training_script: family for family in FAMILIES.values()}


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings_that_are_there(name):
    for target in re.findall(r'(?:\]\(|src=")([^)"\s]+)[)"]', TEXTS[name]):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name
        assert page.exists(), f"{name} links to {target}"
        if heading:
            assert heading in anchors(page.read_text(encoding="utf-8")), f"{name} links to {target}"


def test_every_page_is_in_the_index_and_begins_with_the_answer():
    for name in TEXTS.keys() - {"README.md", "docs/README.md"}:
        assert f"]({name.removeprefix('docs/')})" in TEXTS["docs/README.md"], name
        assert re.match(r"# .+\n\n\*\*", TEXTS[name]), f"{name} begins with something else than **In short:**"


def test_the_readme_is_short():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 160


def test_the_page_of_flags_is_what_the_parsers_say():
    """To write it anew: python scripts/dev/write_flags_page.py"""
    command = importlib.import_module("scripts.dev.write_flags_page")
    assert TEXTS["docs/flags.md"] == command.flags_page()


def test_the_readmes_memory_is_that_of_the_presets():
    rows = re.findall(r"^\| (\w+)_(\d+gb) \|.*\*\*([\d.]+)\*\* \|$", TEXTS["docs/memory.md"], re.MULTILINE)
    assert len(rows) == 20
    for family, card, gib in rows:
        row = re.search(rf"^\| `…_{card}` \|(.*)$", TEXTS["README.md"], re.MULTILINE)[1].split("|")
        assert row[list(FAMILIES).index(family)].split()[0] == gib, (family, card)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command of this project in the indented blocks of a page."""
    found = []
    for name, text in TEXTS.items():
        for line in re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE):
            line = line.replace("…", "").split("  #")[0]
            if re.match(r"(bash run_|python |accelerate launch |uv run |sbatch )", line):
                found.append((name, shlex.split(line)))
    return found


def training_flags(family, argv: list[str]) -> None:
    """Parses arguments of a training script; SystemExit if one is unknown or has an impossible value."""
    recipe = importlib.import_module(Path(family.training_script).stem)
    make_parser = importlib.import_module("lora_training.cli.parsing").make_parser
    usual = recipe.LORA_TARGETS, recipe.USUAL_INFERENCE_STEPS, recipe.USUAL_GUIDANCE
    make_parser(family, recipe.add_family_args, recipe.FOREIGN_FLAGS, *usual).parse_args(argv)


@pytest.mark.parametrize(("name", "argv"), commands(), ids=lambda value: str(value)[:60])
def test_commands_have_flags_that_there_are(name, argv, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    script = next((word for word in argv if word in TRAINING_SCRIPTS), None)
    if script:
        training_flags(TRAINING_SCRIPTS[script], argv[argv.index(script) + 1 :])
    elif argv[2:3] == ["--queue"]:
        monkeypatch.chdir(tmp_path)
        block = re.search(r"^    defaults:\n(?:    .*\n|\n)+?    sweep.*$", TEXTS[name], re.MULTILINE)[0]
        (tmp_path / "night.yaml").write_text(textwrap.dedent(block))
        (tmp_path / "config").symlink_to(ROOT / "config")
        assert len(read_queue(argv[3:])[0]) in (2, 6)
    elif argv[1] == "run_lora_train.sh":
        rest = argv[3:] if argv[2:3] and argv[2] in FAMILIES else argv[2:]
        (_, _, model), rest = take_flags(rest, "--config_file", "--model_variant", MODEL_FLAGS)
        family = next((f for f in FAMILIES.values() if f.usual_base == model), FAMILIES["sdxl"])
        training_flags(family, rest)
    else:
        assert (ROOT / argv[1]).is_file(), f"{name}: {shlex.join(argv)}"
        help_text = ROOT / "docs" / "help" / f"{Path(argv[1]).stem}.txt"
        known = (help_text if help_text.exists() else ROOT / argv[1]).read_text(encoding="utf-8")
        if argv[1] not in ("run_tests.sh", "scripts/start/launch.py", "scripts/measuring/estimate_memory.py"):
            assert [flag for flag in argv if flag.startswith("--") and flag.split("=")[0] not in known] == []
    for flag, value in zip(argv, argv[1:], strict=False):
        if flag in ("--config", "--config_file") and value.startswith("config/"):
            assert (ROOT / value).is_file(), f"{name} names {value}"
