"""Several LoRAs as one file, and factors by block: sums against sums of whole updates."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from trained_loras import draw, train_with_text_encoder

from lora_training.files import read_safetensors_header
from lora_training.lora.reading import read_lora
from lora_training.lora.single_file import BaseWeights
from scripts.lora import merge_lora

pytestmark = pytest.mark.run

FLUX_D = 128  # the toy's width
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR2 = "lora_unet_single_blocks_1_linear2"
CLIP = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


def deltas(file, base: str) -> dict[tuple[str, str], torch.Tensor]:
    """Each layer's whole update."""
    return {(part, name): layer.delta() for part, name, layer in read_lora(file, base=base)}


def kohya_lora(file, ranks: dict[str, int], alpha: float, dtype=torch.float32, seed: int = 0, **metadata):
    """A LoRA for FLUX.1's toy as kohya's scripts spell it: one pair of matrices for q, k and v."""
    shapes = {QKV: (3 * FLUX_D, FLUX_D), LINEAR2: (FLUX_D, 5 * FLUX_D), CLIP: (64, 64)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer, rank in ranks.items():
        height, width = shapes[layer]
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, width, generator=generator).to(dtype)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(height, rank, generator=generator).to(dtype)
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file, metadata={key.replace("_0_", "."): value for key, value in metadata.items()})
    return file


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_the_sum_of_two_loras_is_exact_in_both_spellings(spelling, family, trained, tmp_path, capsys):
    one, two = trained, trained / f"{family.name}.safetensors"
    target = tmp_path / "sum.safetensors"
    command = [str(one), "--lora", str(two), "-0.3", "--into", str(target), "--shape", family.base]
    assert merge_lora.main([*command, "--to", spelling]) == 0
    first, joined = deltas(one, family.base), deltas(target, family.base)
    assert joined.keys() == first.keys()
    assert all(close(joined[k], first[k] * 0.7) for k in first)
    assert "2 LoRAs became one of rank 8: exact" in capsys.readouterr().out
    assert any("lora_down" in key for key in load_file(target)) == (spelling == "kohya")


def test_a_joined_file_draws_in_diffusers_what_its_loras_draw(tmp_path, shelf):
    family = FAMILIES["sd15"]
    trained, target = train_with_text_encoder(family, shelf), tmp_path / "pytorch_lora_weights.safetensors"
    scaled = ["--lora", str(trained), "0.5", "--lora", str(trained), "0.3"]
    assert merge_lora.main([*scaled, "--into", str(target)]) == 0
    kind = diffusers.StableDiffusionPipeline
    own = draw(kind, family.base, family, trained / "pytorch_lora_weights.safetensors", 0.8)
    assert np.abs(draw(kind, family.base, family, target) - own).max() < 1e-4


def test_equal_scales_leave_matrices_and_alpha_as_they_are(tmp_path):
    """alpha / rank 0.25 in both: no matrix is multiplied, and half precision stays."""
    base = FAMILIES["flux"].base
    a = kohya_lora(tmp_path / "a.safetensors", {QKV: 4, CLIP: 4}, 1.0, torch.float16)
    b = kohya_lora(tmp_path / "b.safetensors", {QKV: 8, LINEAR2: 8}, 2.0, torch.float16, seed=1)
    assert merge_lora.main([str(a), str(b), "--into", str(tmp_path / "c.safetensors"), "--shape", base]) == 0
    (x, y), joined = map(load_file, (a, b)), load_file(tmp_path / "c.safetensors")
    assert {k.partition(".")[0] for k in joined} == {QKV, LINEAR2, CLIP}
    for end, dimension in (("lora_down.weight", 0), ("lora_up.weight", 1)):
        both = torch.cat([x[f"{QKV}.{end}"], y[f"{QKV}.{end}"]], dimension)
        assert torch.equal(joined[f"{QKV}.{end}"], both)  # q, k and v still share one down matrix
        assert torch.equal(joined[f"{LINEAR2}.{end}"], y[f"{LINEAR2}.{end}"])
    alphas = [joined[f"{layer}.alpha"].item() for layer in (QKV, LINEAR2, CLIP)]
    assert alphas == [3.0, 2.0, 1.0]


def test_another_scale_makes_a_file_of_float32_unless_its_precision_is_set(tmp_path, capsys):
    base = FAMILIES["flux"].base
    a = kohya_lora(tmp_path / "a.safetensors", {QKV: 4}, 4.0, torch.float16)
    pair = ["--lora", str(a), "0.3", "--lora", str(a), "-1.1", "--shape", base]
    for flags, dtype, said in (
        ((), "float32", "exact\n"),
        (("--dtype", "float16"), "float16", "rounds away"),
    ):
        target = tmp_path / f"{dtype}.safetensors"
        assert merge_lora.main([*pair, "--into", str(target), *flags]) == 0
        assert said in capsys.readouterr().out
        weights = [tensor for key, tensor in load_file(target).items() if "alpha" not in key]
        assert {str(tensor.dtype) for tensor in weights} == {f"torch.{dtype}"}
        for key, update in deltas(a, base).items():
            assert (deltas(target, base)[key] + 0.8 * update).norm() < 2e-3 * update.norm()


def test_a_rank_gives_the_best_sum_of_that_rank_and_says_what_is_lost(tmp_path, capsys):
    """A LoHa can be one of them then; what is printed is the distance from the sum of the whole updates."""
    base, target = FAMILIES["flux"].base, tmp_path / "c.safetensors"
    a = kohya_lora(tmp_path / "a.safetensors", {QKV: 4, LINEAR2: 4}, 4.0)
    b, generator = tmp_path / "b.safetensors", torch.Generator().manual_seed(2)
    factors = {f"hada_w{n}_a": torch.randn(FLUX_D, 2, generator=generator) for n in (1, 2)}
    factors |= {f"hada_w{n}_b": torch.randn(2, 5 * FLUX_D, generator=generator) for n in (1, 2)}
    save_file({f"{LINEAR2}.{k}": v for k, v in factors.items()} | {f"{LINEAR2}.alpha": torch.tensor(2.0)}, b)
    command = ["--lora", str(a), "0.5", "--lora", str(b), "2", "--into", str(target), "--shape", base]
    assert merge_lora.main(command) == 2
    assert "LoHa is not two matrices: --rank 32" in capsys.readouterr().err
    assert merge_lora.main([*command, "--rank", "3"]) == 0
    printed = float(re.search(r"([\d.]+)% of the sum is lost", capsys.readouterr().out)[1]) / 100
    parts = deltas(a, base), deltas(b, base)
    exact = {k: sum(p[k] * s for p, s in zip(parts, (0.5, 2), strict=True) if k in p) for k in parts[0]}
    joined = deltas(target, base)
    error = sum((joined[k] - v).square().sum() for k, v in exact.items())
    assert printed == pytest.approx(
        float(error / sum(v.square().sum() for v in exact.values())) ** 0.5, abs=1e-4
    )
    single = next(v for k, v in exact.items() if "proj_out" in k[1])
    best = torch.linalg.svdvals(single)[3:].norm()
    assert (joined[next(k for k in exact if "proj_out" in k[1])] - single).norm() < 1.001 * best


def test_metadata_says_what_is_in_the_sum(tmp_path):
    names = {"modelspec_0_title": "t", "ss_network_dim": "4", "sshs_model_hash": "0", "ss_clip_skip": "2"}
    a = kohya_lora(tmp_path / "a.safetensors", {QKV: 4}, 4.0, modelspec_0_trigger_phrase="sks", **names)
    b = kohya_lora(
        tmp_path / "b.safetensors", {QKV: 2}, 2.0, modelspec_0_trigger_phrase="ukj", ss_seed="3", **names
    )
    for spelling in ("kohya", "diffusers"):
        target = tmp_path / f"{spelling}.safetensors"
        command = [str(a), str(b), "--into", str(target), "--to", spelling, "--shape", FAMILIES["flux"].base]
        assert merge_lora.main(command) == 0
        written = read_safetensors_header(target)[0]
        assert written["modelspec.trigger_phrase"] == "sks, ukj" and written["ss_clip_skip"] == "2"
        assert written["modelspec.merged_from"] == f"{a}, {b}" and "ss_seed" not in written
        assert written.get("modelspec.title") != "t" and written.get("ss_network_dim") in (None, "6")


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("double_blocks=0.5 single_blocks=0", {QKV: 0.5, LINEAR2: 0, CLIP: 1}),
        ("transformer_blocks.0=0.5, single_transformer_blocks.0-1=0", {QKV: 0.5, LINEAR2: 0, CLIP: 1}),
        ("double_blocks=3 double_blocks.0.img_attn=-2 text_encoder=0", {QKV: -2, LINEAR2: 1, CLIP: 0}),
    ],
)
def test_blocks_have_weights_of_their_own(blocks, expected, tmp_path):
    """In one LoRA, and in the merged base: nothing where a weight is 0, the last entry counts."""
    base, target = FAMILIES["flux"].base, tmp_path / "c.safetensors"
    a = kohya_lora(tmp_path / "a.safetensors", dict.fromkeys(expected, 4), 4.0)
    weighted = ["--block_weights", blocks, "--shape", base]
    assert merge_lora.main([str(a), "--into", str(target), *weighted]) == 0
    weights = dict(zip(("attn.to_", "proj_out", "q_proj"), expected.values(), strict=True))
    exact, joined = deltas(a, base), deltas(target, base)
    for (part, name), update in exact.items():
        factor = next(factor for layer, factor in weights.items() if layer in name)
        if factor:
            assert close(joined[part, name], update * factor)
        else:
            assert (part, name) not in joined
    merged = tmp_path / "merged"
    assert merge_lora.main([base, str(merged), "--lora", str(a), "--dtype", "float32", *weighted[:2]]) == 0
    config = read_lora(a, base=base).base.config
    before, after = (BaseWeights(folder, "flux", config) for folder in (Path(base), merged))
    for key, update in exact.items():
        factor = next(factor for layer, factor in weights.items() if layer in key[1])
        assert torch.allclose(after(*key).float() - before(*key).float(), update * factor, atol=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("A --into O --block_weights single_blocks.0-40=0", "has single_blocks.0 to 2"),
        ("A --into O --block_weights singel_blocks=0", "the nearest is single_blocks"),
        ("A --into O --block_weights single_blocks.3-1=0", "3-1 is no range of blocks"),
        ("A --into O --block_weights single_blocks", "expected BLOCK=WEIGHT"),
        ("A --into O --block_weights double_blocks=nan", "expected BLOCK=WEIGHT"),
        ("A --into O --block_weights double_blocks=0", "nothing remains of the LoRAs"),
        ("BASE M --lora A --block_weights double_blocks=0", "leaves nothing of the LoRAs"),
        ("Y X --into O", "X is for the released sdxl, Y for the released sd15: no sum is for both"),
        ("A --into A", "A is there already"),
        ("A --into O --rank 0", "--rank 0: must be 1 or more"),
        ("A --into M", "must end with .safetensors"),
        ("A D --into O", "D: a DoRA can't be added without its base"),
        ("A N --into O", "weights that are not finite"),
        ("--into O", "--into: name the LoRAs"),
        ("BASE M --lora A --rank 4", "--rank and --to are for --into"),
        ("BASE --lora A", "expected BASE TARGET --lora FILE, or LoRAs and --into TARGET"),
    ],
)
def test_one_line_says_why_loras_do_not_become_one(arguments, expected, faulty, capsys):
    before = set(faulty["O"].parent.iterdir())
    files = {name: str(file) for name, file in faulty.items()}
    command = [files.get(word, word) for word in arguments.split()]
    shape = ["--base", files["BASE"]] if "X" not in arguments.split() else []
    assert merge_lora.main([*command, *shape]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line]
    for name, file in files.items():
        expected = expected.replace(f"{name} is", f"{file} is").replace(f", {name} for", f", {file} for")
    assert expected.replace("D: a DoRA", f"{files['D']}: a DoRA") in line
    assert set(faulty["O"].parent.iterdir()) == before


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> dict:
    """Files by letter: a LoRA, one with DoRA, one with NaN, one for SDXL; places to write to; the base."""
    folder = tmp_path_factory.mktemp("faulty")
    files = {name: folder / f"{name}.safetensors" for name in "ADNXYO"} | {"M": folder / "M"}
    tensors = load_file(kohya_lora(files["A"], {QKV: 4}, 4.0))
    save_file(tensors | {f"{QKV}.dora_scale": torch.ones(3 * FLUX_D, 1)}, files["D"])
    save_file(tensors | {f"{QKV}.lora_up.weight": tensors[f"{QKV}.lora_up.weight"] * torch.nan}, files["N"])
    blocks = {"X": ("input_blocks_4_1", 640), "Y": ("down_blocks_0_attentions_0", 320)}
    for name, (block, width) in blocks.items():  # of SDXL and SD 1.5 as released
        layer = f"lora_unet_{block}_transformer_blocks_0_attn1_to_q"
        down, up = torch.ones(2, width), torch.ones(width, 2)
        save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, files[name])
    return files | {"BASE": FAMILIES["flux"].base}
