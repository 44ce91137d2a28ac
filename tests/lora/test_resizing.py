"""LoRAs of another rank, and plain LoRAs of DoRA: the best of their rank, and what is said to be lost."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import ROOT, SAMPLE, run_here
from safetensors.torch import load_file
from trained_loras import train_with_text_encoder

from lora_training.lora.low_rank import apply_delta
from lora_training.lora.reading import read_lora
from lora_training.lora.single_file import BaseWeights
from scripts.lora import convert_lora, resize_lora

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


def test_resized_lora_is_the_best_of_its_rank(family, trained, tmp_path, capsys):
    source, target = trained / f"{family.name}.safetensors", tmp_path / "small.safetensors"
    exact = {(part, name): x.delta() for part, name, x in read_lora(source, base=family.base)}
    sizes = {}
    for flags in (["--rank", "2"], ["--keep", "0.9"], ["--keep", "1"]):
        assert resize_lora.main([str(source), str(target), *flags, "--base", family.base]) == 0
        small = {(part, name): x for part, name, x in read_lora(target, base=family.base)}
        assert small.keys() == exact.keys()
        lost = sum((small[k].delta() - u).square().sum() for k, u in exact.items())
        share = (lost / sum(u.square().sum() for u in exact.values())).sqrt().item()
        said = capsys.readouterr().out
        printed = float(said.split("% of the update")[0].rsplit(" ", 1)[1]) / 100
        assert printed == pytest.approx(share, abs=1e-4)
        sizes[flags[1]] = (target.stat().st_size, share)
        assert all(
            t.shape[0] == 2
            for k, t in load_file(target).items()
            if flags[1] == "2" and k.endswith("lora_down.weight")
        )
    assert sizes["1"][1] < 1e-5 and 0 < sizes["0.9"][1] < 0.33 and sizes["2"][0] < source.stat().st_size
    assert resize_lora.main([str(source), str(target)]) == 2
    assert resize_lora.main([str(source), str(source), "--rank", "2"]) == 2
    assert "name another target" in capsys.readouterr().err


@pytest.mark.families("flux", "sd3")
def test_dora_of_default_layers_is_written_for_other_tools(family, tmp_path, capsys):
    """Where the original holds layers as one, those without LoRA keep their norms; a plain LoRA of it is the
    way out.
    """
    output = tmp_path / "x"
    assert run_here(family, output, "-d", SAMPLE, "--use_dora", "--learning_rate", 2e-2) == 0
    assert "resize_lora.py" in capsys.readouterr().out
    own, other = read_lora(output), read_lora(output / "x.safetensors")
    weights = BaseWeights(ROOT / family.base, family.name, own.base.config)

    def merged(lora):
        return {(part, n): apply_delta(weights(part, n), x.delta(), x) for part, n, x in lora}

    first, second = merged(own), merged(other)
    assert all(torch.equal(first[k], second[k]) for k in first) and len(second) > len(first)
    assert all(
        torch.allclose(second[k], weights(*k).float(), atol=1e-6) for k in second.keys() - first.keys()
    )
    file, small = tmp_path / "alone.safetensors", tmp_path / "small.safetensors"
    shutil.copy(output / "x.safetensors", file)
    assert resize_lora.main([str(file), str(small), "--keep", "0.9999", "--base", family.base]) == 0
    plain = {(part, n): weights(part, n).float() + x.delta() for part, n, x in read_lora(small)}
    total = sum((first[k] - weights(*k).float()).square().sum() for k in first)
    assert sum((plain[k] - first[k]).square().sum() for k in first) < 1e-3 * total
    assert convert_lora.main([str(output), str(tmp_path / "again.safetensors")]) == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.allclose(again[k], t, atol=1e-6) for k, t in load_file(output / "x.safetensors").items())
