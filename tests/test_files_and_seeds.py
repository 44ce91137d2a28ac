"""The library's ground floor: caches by content, checkpoints by number, seeds by place."""

from __future__ import annotations

import pytest
import torch

from lora_training.cache import DiskCache
from lora_training.files import list_checkpoints
from lora_training.seeds import stable_seed

pytestmark = pytest.mark.unit


def test_draws_depend_on_the_place_alone():
    assert stable_seed(1, "a", 2) == stable_seed(1, "a", 2) != stable_seed(1, "a", 3)
    assert 0 <= stable_seed("x") < 2**63


def test_cache_entries_belong_to_their_content(tmp_path):
    cache = DiskCache(str(tmp_path), "latents")
    cache.store({"moments": torch.ones(2)}, "image", "vae")
    assert torch.equal(cache.load("image", "vae")["moments"], torch.ones(2))
    assert cache.load("image", "other vae") is None
    assert cache.damaged == 0  # it has a file of its own
    file = next((tmp_path / "latents").iterdir())
    file.write_bytes(b"broken")
    assert cache.load("image", "vae") is None


def test_only_our_checkpoints_count(tmp_path):
    for name in ("checkpoint-5", "checkpoint-12", "checkpoint-backup-900", "checkpoint-²", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-5"]
