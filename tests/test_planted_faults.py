"""scripts/measuring/plant_faults.py: its faults still have a place in the scripts, and it tells a caught one from another."""

import json

import pytest
from conftest import FAMILIES

from scripts.measuring import plant_faults
from scripts.measuring.parts.planted_faults import FAULTS, Fault

pytestmark = pytest.mark.unit


def test_every_text_stands_once_in_the_scripts(capsys):
    """One that has moved would be planted nowhere: after a change of a script its fault is written anew."""
    assert plant_faults.main(["--check"]) == 0, capsys.readouterr().err
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.where for fault in FAULTS} == {"shared", *FAMILIES}


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("return", None)])
def test_a_text_that_does_not_stand_once_is_an_error(old, count):
    fault = Fault("x", "sd15", old, "y", "loss", ())
    with pytest.raises(plant_faults.FaultError, match="x: .* stands .* times in train_lora_sd15.py"):
        plant_faults.planted(fault, plant_faults.ROOT)


def test_caught_and_uncaught_are_told_apart(tmp_path, monkeypatch, capsys):
    """Two faults in a copy: a test that fails, and one that passes whatever happens. The originals stay."""
    copy = (
        Fault("seen", "sd15", "DEFAULT_RESOLUTION = 512", "DEFAULT_RESOLUTION = 8", "size", ("test_tiny.py",)),
        Fault("unseen", "sd15", 'HUB_TAGS = ["stable', 'HUB_TAGS = ["un', "tags", ("test_tiny.py",)),
    )
    tiny = "def test_size():\n    assert 'RESOLUTION = 512' in open('train_lora_sd15.py').read()\n"
    before = (plant_faults.ROOT / "train_lora_sd15.py").read_text()
    monkeypatch.setattr(plant_faults, "FAULTS", copy)

    def copied(target):
        (target / "tests").mkdir()
        (target / "tests" / "test_tiny.py").write_text(tiny)
        (target / "train_lora_sd15.py").write_text(before)

    monkeypatch.setattr(plant_faults, "copy_repository", copied)
    words = ["--results", str(tmp_path / "r.jsonl"), "--table", str(tmp_path / "t.md")]
    assert plant_faults.main(words) == 1
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["fault"], row["caught"]) for row in rows] == [("seen", "test_tiny.py::test_size"), ("unseen", "")]
    assert "1 of 2 planted faults are caught" in (tmp_path / "t.md").read_text()
    assert plant_faults.main(words) == 1  # nothing is left to do, and the table is written once
    assert (tmp_path / "t.md").read_text().count("| unseen |") == 1
    assert (plant_faults.ROOT / "train_lora_sd15.py").read_text() == before
    assert plant_faults.main(["--only", "nothing"]) == 2
    assert "no fault is called nothing" in capsys.readouterr().err
