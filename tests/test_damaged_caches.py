"""Files of the ground floor that are half written or damaged, or can't be written: none is trusted."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_training.cache import DiskCache
from lora_training.files import atomic_write

pytestmark = pytest.mark.faults


def flip_a_bit(file: Path, other: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)


def with_tensors(change):
    """A damage: changed tensors with the metadata that the file had."""

    def damage(file: Path, other: Path) -> None:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        save_file(change(load_file(file)), file, metadata=metadata)

    return damage


DAMAGED_ENTRIES = {
    "another entry's": lambda file, other: shutil.copy(other, file),
    "a flipped bit": flip_a_bit,
    "cut": lambda file, other: file.write_bytes(file.read_bytes()[:-4]),
    "empty": lambda file, other: file.write_bytes(b""),
    "NaN": with_tensors(lambda t: {key: torch.full_like(value, math.nan) for key, value in t.items()}),
    "another shape": with_tensors(lambda t: {key: value.reshape(-1) for key, value in t.items()}),
    "another type": with_tensors(lambda t: {key: value.view(torch.int32) for key, value in t.items()}),
    "another name": with_tensors(lambda t: {f"{key}x": value for key, value in t.items()}),
    "without hash": lambda file, other: save_file(load_file(file), file),
}


@pytest.mark.parametrize("case", DAMAGED_ENTRIES)
def test_a_damaged_cache_entry_counts_as_missing(tmp_path, capsys, case):
    cache = DiskCache(str(tmp_path), "latents")
    tensors = {"moments": torch.arange(12.0).reshape(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)}
    factor = 2 if case == "another entry's" else 1
    cache.store(tensors, "a", 1)
    cache.store({key: value * factor for key, value in tensors.items()}, "b", 2)
    if case == "another type":
        cache.store({"moments": tensors["moments"]}, "a", 1)
    assert torch.equal(cache.load("a", 1)["moments"], tensors["moments"])
    DAMAGED_ENTRIES[case](cache.file(("a", 1)), cache.file(("b", 2)))
    assert cache.load("a", 1) is None and "is damaged and made anew" in capsys.readouterr().out
    assert cache.load("b", 2) is not None
    cache.store(tensors, "a", 1)
    assert cache.load("a", 1) is not None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = DiskCache(str(tmp_path / "file"), "latents")
    for _ in range(3):
        cache.store({"a": torch.ones(1)}, "a")
        assert cache.load("a") is None
    assert capsys.readouterr().out.count("can't be written to") == 1


def test_a_file_appears_when_it_is_whole(tmp_path):
    for number, error in enumerate((KeyboardInterrupt, ValueError, OSError)):
        file = tmp_path / f"{number}.png"
        file.write_bytes(b"before")
        with pytest.raises(error), atomic_write(file) as part:
            part.write_bytes(b"half")
            raise error
        assert file.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == number + 1
        with atomic_write(file) as part:
            part.write_bytes(b"after")
        assert file.read_bytes() == b"after"
