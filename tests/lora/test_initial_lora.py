"""--init_lora: a run that starts from an earlier one's LoRA; and --preserve_class, which shows with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script, metrics, run_here
from safetensors.torch import load_file, save_file
from toy_parts import arguments, empty_denoiser, toy_base

from lora_training.lora.formats import kohya_state
from lora_training.lora.initial import read_initial_lora
from lora_training.lora.reading import read_lora
from scripts.lora import resize_lora

pytestmark = pytest.mark.run


LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{family name: the folder of a run of rank 3 and alpha 6}, made when it is first asked for."""
    folders = {}

    def folder_of(family):
        if family.name not in folders:
            folder = tmp_path_factory.mktemp(f"start-{family.name}") / "mine"
            flags = ("--rank", 3, "--lora_alpha", 6, "--learning_rate", 1e-2, "--lora_layers", "to_q", "to_v")
            assert run_here(family, folder, "-d", SAMPLE, "--upcast_before_saving", *flags) == 0
            folders[family.name] = folder
        return folders[family.name]

    return folder_of


@pytest.mark.parametrize(("name", "spelling"), [("sdxl", "diffusers"), ("flux", "kohya")])
def test_a_run_starts_from_a_lora_with_its_rank_alpha_and_layers(name, trained, spelling, tmp_path):
    family, source = FAMILIES[name], trained(FAMILIES[name])
    start = source if spelling == "diffusers" else source / "mine.safetensors"
    flags = ("--init_lora", start, "--learning_rate", 1e-7, "--max_train_steps", 1, "--upcast_before_saving")
    assert run_here(family, tmp_path, "-d", SAMPLE, *flags) == 0
    before, after = load_file(source / LORA), load_file(tmp_path / LORA)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.allclose(after[key], value, atol=1e-6)


def test_a_start_in_kohyas_spelling_is_the_lora_that_was_written(script, tmp_path):
    """With its rank and alpha; in SD3's and FLUX.1's files q, k and v are one layer."""
    family, base = script.FAMILY, toy_base(script)
    config = json.loads((base / family.denoiser / "config.json").read_text())
    state = {}
    for name, layer in empty_denoiser(config).named_modules():
        if name.endswith(("to_q", "to_v")):
            state[f"{name}.lora_A.weight"] = torch.randn(3, layer.in_features)
            state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 3)
    assert len(state) > 8
    file = tmp_path / "x.safetensors"
    save_file(kohya_state(family, {family.denoiser: state}, 6.0, config), file)
    args = arguments(script, "--init_lora", file)
    start = read_initial_lora(args, base)
    assert (args.rank, args.lora_alpha) == (3, 6) and start.keys() == {family.denoiser}
    assert start[family.denoiser].keys() == state.keys()
    for key, value in start[family.denoiser].items():
        assert torch.allclose(value, state[key], atol=1e-6)


@pytest.mark.families("sdxl")
def test_what_a_start_refuses(family, trained, tmp_path, capsys):
    source, other = trained(family), trained(FAMILIES["flux"])
    uneven = tmp_path / "uneven.safetensors"
    tensors = load_file(source / LORA)
    first = next(key for key in tensors if ".lora_A." in key or ".lora.down." in key)
    save_file(tensors | {first: torch.cat([tensors[first]] * 2)}, uneven)
    (tmp_path / "text.safetensors").write_text("no tensors")
    cases = {
        (source, "--rank", 5): "--rank 5: --init_lora",
        (source, "--init_lora_weights", "orthogonal"): "--init_lora_weights has no effect with --init_lora",
        (other,): "is it a LoRA for another family?",
        (other / "mine.safetensors",): "--init_lora: ",
        (uneven,): "its two matrices don't belong together",
        (tmp_path / "text.safetensors",): "--init_lora",
        (tmp_path / "none.safetensors",): "no such file",
    }
    for (start, *flags), message in cases.items():
        assert run_here(family, tmp_path / "out", "-d", SAMPLE, "--init_lora", start, *flags) == 2
        assert message in capsys.readouterr().err


@pytest.mark.families("sdxl")
def test_new_tokens_start_from_those_beside_the_lora(family, tmp_path):
    flags = ("-d", SAMPLE, "--trigger_word", "TOK", "--train_text_encoder_ti", "--text_encoder_lr")
    assert run_here(family, tmp_path / "first", *flags, 1e-2) == 0
    again = (*flags, 1e-7, "--init_lora", tmp_path / "first", "--max_train_steps", 2, "--learning_rate", 1e-7)
    assert run_here(family, tmp_path / "second", *again) == 0
    before, after = (load_file(tmp_path / n / f"{n}_emb.safetensors") for n in ("first", "second"))
    for key, value in before.items():
        assert torch.allclose(after[key], value, atol=1e-5)


@pytest.mark.families("sdxl")
def test_a_kept_class_has_a_loss_of_its_own(family, trained, tmp_path):
    """A new LoRA changes nothing, so there is nothing to preserve; from a trained one there is."""
    word = ("-d", SAMPLE, "--trigger_word", "sks", "--max_grad_norm", 0, "--max_train_steps", 1)
    preserved = ("--preserve_class", "circle", "--preserve_weight", 1000)
    norms = {}
    for name, flags in {"plain": (), "preserved": preserved}.items():
        for start in ("none", "lora"):
            more = ("--init_lora", trained(family)) if start == "lora" else ()
            assert run_here(family, tmp_path / f"{name}-{start}", *word, *flags, *more) == 0
            norms[name, start] = metrics(tmp_path / f"{name}-{start}")[0]["grad_norm"]
    assert norms["preserved", "none"] == pytest.approx(norms["plain", "none"], rel=1e-4)
    assert norms["preserved", "lora"] > 1.5 * norms["plain", "lora"]


def write_uneven_lora(family, file: Path) -> None:
    """A file of the denoiser's layers to_q and to_v as peft writes it, with patterns of ranks and alphas."""
    base = ROOT / family.base
    recipe_family = load_script(family.script).FAMILY
    config = json.loads((base / recipe_family.denoiser / "config.json").read_text())
    tensors, ranks, alphas, part = {}, {}, {}, recipe_family.denoiser
    layers = [pair for pair in empty_denoiser(config).named_modules() if pair[0].endswith(("to_q", "to_v"))]
    for number, (name, layer) in enumerate(layers):
        rank = 2 + number % 3
        tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features)
        tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank)
        ranks[name], alphas[name] = rank, 1.0 + number % 2
    settings = {"r": 2, "lora_alpha": 1.0, "rank_pattern": ranks, "alpha_pattern": alphas}
    metadata = {f"{part}.{key}": value for key, value in settings.items()}
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})


@pytest.mark.parametrize("case", ["sdxl, resized by energy", "flux, peft's patterns"])
def test_a_start_of_uneven_ranks_keeps_them_and_draws_what_it_drew(case, trained, tmp_path, capsys):
    """resize_lora.py, which was advised, leaves them uneven; they were padded to the highest rank once."""
    family, start = FAMILIES[case.split(",")[0]], tmp_path / "start.safetensors"
    if "resized" in case:
        command = [str(trained(family)), str(start), "--keep", "0.7"]
        assert resize_lora.main(command) == 0
    else:
        write_uneven_lora(family, start)
    before = read_lora(start, family.name, str(ROOT / family.base))
    ranks = {layer.rank for _, _, layer in before}
    assert len(ranks) > 1
    flags = ("--init_lora", start, "--learning_rate", 1e-7, "--max_train_steps", 1, "--upcast_before_saving")
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *flags) == 0
    assert f"LoRA, rank {min(ranks)} to {max(ranks)}, alpha / rank" in capsys.readouterr().out
    after = read_lora(tmp_path / "x", family.name, str(ROOT / family.base))
    for part, name, layer in before:
        twin = after.layers[part][name]
        assert twin.rank == layer.rank and twin.alpha / twin.rank == pytest.approx(layer.alpha / layer.rank)
        assert torch.allclose(twin.delta(), layer.delta(), atol=1e-5), name
