"""scripts/dev/plant_faults.py: its faults still have a place, and it tells a caught one from another."""

import json

import pytest
from conftest import FAMILIES, ROOT

from lora_training.errors import UserError
from scripts.dev import plant_faults
from scripts.dev.planted_faults import planting
from scripts.dev.planted_faults.fault import Fault

pytestmark = pytest.mark.unit
SCRIPT = "train_lora_sd15.py"


def test_every_text_stands_once_and_every_test_is_there(capsys):
    """One that has moved would be planted nowhere: after a change of a file its fault is written anew."""
    assert plant_faults.main(["--check"]) == 0, capsys.readouterr().err
    names, files = [{fault[k] for fault in plant_faults.FAULTS} for k in (0, 1)]
    assert len(plant_faults.FAULTS) >= 80 and len(names) == len(plant_faults.FAULTS)
    assert files > {"train_*.py", *(family.script for family in FAMILIES.values())}


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("return", None)])
def test_a_text_that_does_not_stand_once_is_an_error(old, count):
    fault = Fault("x", SCRIPT, "loss", old, "y", ())
    times = r"\d+" if count is None else count
    with pytest.raises(UserError, match=f"x: .* stands {times} times in {SCRIPT}"):
        planting.faulty_texts(fault, ROOT)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault("x", "nowhere.py", "loss", "a", "b", ()), "x: there is no nowhere.py"),
        (Fault("x", SCRIPT, "loss", "FAMILY_RULES = ", "b", ("test_of_nothing",)), "no test is called"),
    ],
)
def test_a_file_or_test_that_is_not_there_is_an_error(fault, problem):
    with pytest.raises(UserError, match=problem):
        planting.check_fault(fault, ROOT)


def test_a_text_of_all_training_scripts_is_changed_in_each():
    (fault,) = plant_faults.choose_faults(["l1 loss"])
    texts = planting.faulty_texts(fault, ROOT)
    assert {file.name for file in texts} == {family.script for family in FAMILIES.values()}
    assert all(fault.new in text and fault.old not in text for text in texts.values())


TINY_TEST = f"""
def test_the_number_of_steps():
    assert "USUAL_INFERENCE_STEPS = 50" in open("{SCRIPT}").read()
"""


def test_caught_and_uncaught_are_told_apart(tmp_path, monkeypatch, capsys):
    """Two faults in a copy: a test that fails, and one that passes whatever happens. The originals stay."""
    steps, tests = ("USUAL_INFERENCE_STEPS = 50", "USUAL_INFERENCE_STEPS = 8"), ("test_the_number_of_steps",)
    faults = (
        Fault("seen", SCRIPT, "steps", *steps, tests),
        Fault("unseen", SCRIPT, "guidance", "USUAL_GUIDANCE = ", "USUAL_GUIDANCE = 2 * ", tests),
    )
    before = (ROOT / SCRIPT).read_text()

    def copy_repository(target):
        (target / "tests" / "room").mkdir(parents=True)
        (target / "tests" / "room" / "test_tiny.py").write_text(TINY_TEST)
        (target / SCRIPT).write_text(before)

    monkeypatch.setattr(plant_faults, "FAULTS", faults)
    monkeypatch.setattr(planting, "copy_repository", copy_repository)
    monkeypatch.setattr(planting, "check_fault", lambda fault, root: None)
    argv = ["--results", str(tmp_path / "r.jsonl"), "--table", str(tmp_path / "t.md")]
    assert plant_faults.main(argv) == 1
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    node = "room/test_tiny.py::test_the_number_of_steps"
    assert [(row["fault"], row["caught"]) for row in rows] == [("seen", node), ("unseen", "")]
    assert "1 of 2 planted faults are caught" in (tmp_path / "t.md").read_text()
    assert plant_faults.main(argv) == 1  # nothing is left to do, and the table is written once
    assert (tmp_path / "t.md").read_text().count("| unseen |") == 1
    assert (ROOT / SCRIPT).read_text() == before
    assert plant_faults.main(["--only", "nothing"]) == 2
    assert "no fault is called nothing" in capsys.readouterr().err
