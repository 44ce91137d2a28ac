"""metadata.jsonl and metadata.csv as people write them, and the one line about those that can't be read."""

from __future__ import annotations

import json

import pytest
from conftest import SAMPLE

from lora_training.data.folders import folder_examples
from lora_training.data.metadata_files import read_metadata
from lora_training.errors import UserError

pytestmark = pytest.mark.faults

METADATA = {  # content; captions by file, or what the error says
    "a line separator in a caption": (
        '{"file_name": "0.png", "text": "a\u2028b"}\n'.encode(),
        {"0.png": ["a b"]},
    ),
    "other separators": ('{"file_name": "0.png", "text": "a\x85b\u2029c"}'.encode(), {"0.png": ["a b c"]}),
    "Windows' lines": (
        b'{"file_name": "0.png", "text": "a"}\r\n\r\n{"file_name": "1.png"}',
        {"0.png": ["a"], "1.png": []},
    ),
    "cut UTF-16": ('{"file_name": "0.png", "text": "a"}\n'.encode("utf-16")[:-1], {"0.png": ["a"]}),
    "half a character": (b'{"file_name": "0.png", "text": "\\ud83d"}', {"0.png": ["\\ud83d"]}),
    "a number": (b'{"file_name": 7, "text": "a"}', "line 1: no file_name can be 7"),
    "a list": (b'{"file_name": "0.png"}\n\n{"file_name": ["0.png"]}', "line 3: no file_name can be"),
    "NUL": (b'{"file_name": "a\\u0000b.png"}', "line 1: no file_name can be"),
    "a surrogate": (b'{"file_name": "\\udcff.png"}', "line 1: no file_name can be"),
    "no object": (b'{"file_name": "0.png"}\n"a"\n', "line 2: no file_name"),
    "deep JSON": (b"\n" + b"[" * 100_000, "line 2: not JSON"),
    "a dictionary as caption": (b'{"file_name": "0.png", "text": {"en": "a"}}', "line 1: a caption is text"),
    "a folder": (b'{"file_name": "."}', "there is no such file"),
    "an absolute path": (b'{"file_name": "/etc/passwd"}', "line 1: file_name '/etc/passwd' leads out"),
    "out and in again": (b'{"file_name": "../../x/0.png"}', "leads out"),
}


@pytest.fixture
def uncaptioned(pictures):
    """The folder of pictures without their .txt files, and a picture beside it."""
    for file in pictures.glob("*.txt"):
        file.unlink()
    (pictures.parent / "secret.png").write_bytes((pictures / "0.png").read_bytes())
    return pictures


@pytest.mark.parametrize("case", METADATA)
def test_odd_metadata(uncaptioned, case):
    content, expected = METADATA[case]
    (uncaptioned / "metadata.jsonl").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected.replace("[", r"\[")):
            folder_examples(uncaptioned, None)
    else:
        captions = {example.name: example.captions for example in folder_examples(uncaptioned, None)}
        assert {name: captions[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"file_name": "../secret.png", "text": "x"}', "leads out of the data folder"),
        ('{"file_name": "missing.png", "text": "x"}', "there is no such file"),
        ('{"file_name": ', "line 1: not JSON"),
        ('{"text": "x"}', "no file_name"),
    ],
)
def test_metadata_that_lies(uncaptioned, row, reason):
    (uncaptioned / "metadata.jsonl").write_text(row)
    with pytest.raises(UserError, match=reason):
        folder_examples(uncaptioned, None)


def test_a_long_field_and_a_wrong_line_of_csv(pictures):
    file = pictures / "metadata.csv"
    file.write_text(f'file_name,text\n0.png,"{"word " * 60_000}"\n1.png,"two\nlines"\n')
    rows = read_metadata(file)
    assert len(rows[0][1]["text"]) == 300_000 and rows[1][1]["text"] == "two\nlines"
    file.write_text('file_name,text\n0.png,"two\nlines"\n,a\n')
    with pytest.raises(UserError, match="line 4: no file_name"):
        read_metadata(file)
    file.write_text("")
    assert read_metadata(file) == []


def test_pictures_that_are_described_twice_are_named(uncaptioned, capsys):
    rows = [("0.png", "a"), ("1.png", "b"), ("0.png", "a"), ("1.png", "c"), ("./2.png", "d"), ("2.png", "e")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (uncaptioned / "metadata.jsonl").write_text("\n".join(lines))
    captions = {example.name: example.captions for example in folder_examples(uncaptioned, None)}
    assert (captions["0.png"], captions["1.png"], captions["2.png"]) == (["a"], ["c"], ["e"])
    assert "metadata.jsonl line 4: 1.png, metadata.jsonl line 6: 2.png" in capsys.readouterr().out


def test_a_caption_column_without_metadata_is_refused(pictures):
    with pytest.raises(UserError, match="--caption_column prompt has no effect"):
        folder_examples(pictures, "prompt")


def test_caption_column_that_is_not_there():
    with pytest.raises(UserError, match="--caption_column txt"):
        folder_examples(SAMPLE, "txt")
