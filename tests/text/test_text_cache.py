"""Embeddings that are computed once."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    prompts_of,
)
from safetensors.torch import load_file, save_file
from toy_parts import arguments, components_of, toy_base

from lora_training.base_model.components import Components
from lora_training.cache import DiskCache
from lora_training.text.prompts import Prompts

pytestmark = pytest.mark.unit


@pytest.mark.families("sd3")
def test_text_from_the_cache_is_the_computed_one(script, family, tmp_path):
    """Of every kind of encoder; read by a second run that computes nothing."""
    texts = ["a red circle", "a blue star"]
    results = []
    for _ in range(2):
        base = components_of(script)
        base.args.cache_folder = str(tmp_path)
        prompts = prompts_of(script, base.args, base)
        results.append(prompts.lookup(texts))
    assert not set(base.loaded) & {encoder for _, encoder in script.FAMILY.text_encoders.values()}
    plain = components_of(script)
    expected = prompts_of(script, plain.args, plain).lookup(texts)
    for result in results:
        assert all(torch.allclose(result[k], expected[k], atol=1e-5) for k in expected)


def test_text_of_another_base_is_not_taken_from_the_cache(recipe, tmp_path):
    base = shutil.copytree(toy_base(recipe), tmp_path / "base")
    (file,) = (base / "text_encoder").glob("*.safetensors")
    save_file({k: v * 1.3 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    embeds = []
    for folder in (toy_base(recipe), base):
        args = arguments(recipe)
        args.cache_folder = str(tmp_path / "cache")
        components = Components(folder, args, torch.float32, torch.device("cpu"))
        embeds.append(prompts_of(recipe, args, components).lookup(["a circle"])["prompt_embeds"])
    assert (embeds[0] - embeds[1]).abs().max() > 0.01


@pytest.mark.parametrize("streamed", [False, True])
def test_captions_are_computed_once(streamed, monkeypatch):
    """Alone, so that none depends on another; together where the weights have to come in for each pass."""
    prompts, groups = Prompts.__new__(Prompts), []
    prompts.args, prompts.known = SimpleNamespace(captions_vary=False), {}
    prompts.disk, prompts.altered = DiskCache(None, "text"), set()
    prompts.streamed = {"t5"} if streamed else set()

    def compute(key, group):
        groups.append(group)
        return {"hidden": torch.stack([torch.full((4, 2), float(len(text))) for text in group])}

    monkeypatch.setattr(prompts, "compute", compute)
    monkeypatch.setattr(prompts, "text_encoder", lambda key: None)
    for _ in range(2):
        rows = prompts.encode("t5", ["a", "bbb", "a", "cc"])
        assert [row["hidden"].tolist() for row in rows] == [[[[n, n]] * 4] for n in (1.0, 3.0, 1.0, 2.0)]
    assert groups == ([["a", "bbb", "cc"]] if streamed else [["a"], ["bbb"], ["cc"]])
