"""Tables of pictures: a cell without one is left out by name, and paths are relative to the table."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import QUICKEST, SAMPLE, metrics, run_here

from lora_training.data.hf_datasets import read_cell, table_folders

pytestmark = pytest.mark.faults

RAW = (SAMPLE / "smiley_00.png").read_bytes()
CELLS = {  # what a cell holds: what is said of its row
    "null": (None, "no picture in this row"),
    "neither bytes nor path": ({"bytes": None, "path": None}, "no picture in this row"),
    "no picture": ({"bytes": b"broken", "path": None}, "not an image"),
    "half a picture": ({"bytes": RAW[: len(RAW) // 2], "path": None}, "damaged"),
    "a path to nothing": ({"bytes": None, "path": "pictures/gone.png"}, "pictures/gone.png: no such file"),
}


def write_table(file: Path, cells: list, captions: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "text": captions})
    pyarrow.parquet.write_table(table, file)
    return file


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_without_a_picture_is_left_out_by_its_row(tmp_path, capsys, case):
    cell, reason = CELLS[case]
    file = write_table(tmp_path / "t" / "train.parquet", [{"bytes": RAW, "path": "a"}, cell], ["a face", "b"])
    assert run_here(QUICKEST, tmp_path / "x", "--dataset_name", file.parent, "--max_train_steps", 1) == 0
    assert f"row 1 is left out: {reason}" in capsys.readouterr().out
    assert len(metrics(tmp_path / "x")) == 1


@pytest.mark.parametrize("place", ["train.parquet", "data/train-00000-of-00001.parquet"])
@pytest.mark.parametrize("names", ["the folder", "the file"])
def test_paths_in_a_table_are_relative_to_it(tmp_path, monkeypatch, capsys, place, names):
    """Wherever the training is started, and whether the table or its folder is named."""
    folder = tmp_path / "t"
    file = write_table(
        folder / place, [{"bytes": None, "path": "pictures/a.png"}, {"bytes": RAW, "path": "b"}], ["a", None]
    )
    (file.parent / "pictures").mkdir()
    (file.parent / "pictures" / "a.png").write_bytes((SAMPLE / "smiley_01.png").read_bytes())
    named = folder if names == "the folder" else file
    flags = ("--max_train_steps", 1, "--default_caption", "a face")
    assert run_here(QUICKEST, tmp_path / "x", "--dataset_name", named, *flags) == 0
    out = capsys.readouterr().out
    assert "2 images from" in out and "left out" not in out


@pytest.mark.parametrize("name", ["someone/pictures", "t", "t/train.parquet"])
def test_paths_that_are_whole_are_read_wherever_the_table_is(tmp_path, monkeypatch, name):
    """As in a data set of the hub, whose pictures `datasets` has unpacked."""
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "cache" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(RAW)
    write_table(tmp_path / "t" / "train.parquet", [], [])
    table = [{"image": {"bytes": None, "path": path}} for path in (str(picture), "cache/a.png")]
    for row in range(2):
        assert read_cell(table, "image", table_folders(name), row) == RAW


@pytest.mark.parametrize("flags", [("--dataset_split", "nonsense"), ("--dataset_config_name", "other")])
def test_a_table_file_has_no_split_or_configuration_but_train(tmp_path, capsys, flags):
    file = write_table(tmp_path / "t" / "train.parquet", [{"bytes": RAW, "path": "a"}], ["a"])
    assert run_here(QUICKEST, tmp_path / "x", "--dataset_name", file, *flags) == 2
    assert " ".join(flags) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_table_is_one_line(tmp_path, capfd, left):
    """`datasets` logs what it then raises."""
    file = write_table(tmp_path / "t" / "train.parquet", [{"bytes": RAW, "path": "a"}], ["a"])
    file.write_bytes(file.read_bytes()[:left])
    assert run_here(QUICKEST, tmp_path / "x", "--dataset_name", file) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"--dataset_name {file}: " in line


@pytest.mark.parametrize("flag", ["-d", "--instance_data_dir"])
def test_a_table_given_as_a_folder_is_told_where_it_goes(tmp_path, capsys, flag):
    file = write_table(tmp_path / "t" / "train.parquet", [{"bytes": RAW, "path": "a"}], ["a"])
    prompt = ("--instance_prompt", "a face") if flag != "-d" else ()
    for given in (file, file.parent):
        assert run_here(QUICKEST, tmp_path / "x", flag, given, *prompt) == 2
        assert "--dataset_name" in capsys.readouterr().err.splitlines()[-1]
