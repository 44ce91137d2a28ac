"""--lora_type loha and lokr: what peft trains is what other tools make of the exported file, and what is
drawn.
"""

from __future__ import annotations

import json

import diffusers
import numpy as np
import peft
import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script, run_here
from PIL import Image
from safetensors.torch import load_file, save_file

import infer_lora
from lora_training import families
from lora_training.lora.reading import read_lora, read_lora_tensors
from scripts.lora import convert_lora, inspect_lora, merge_lora

pytestmark = pytest.mark.run


LORA = "pytorch_lora_weights.safetensors"


KINDS = {"loha": ("--lora_type", "loha"), "lokr": ("--lora_type", "lokr", "--lokr_factor", 4)}


FLAGS = (
    "--rank",
    6,
    "--lora_alpha",
    12,
    "--learning_rate",
    3e-2,
    "--upcast_before_saving",
    "--max_train_steps",
    3,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(family name, kind) -> the folder of a run of rank 6 and alpha 12, made when it is first asked for."""
    made = {}

    def of(name, kind):
        if (name, kind) not in made:
            folder, family = tmp_path_factory.mktemp(f"{name}-{kind}") / "mine", FAMILIES[name]
            layers = ("--lora_layers", *family.lora_layers)
            assert run_here(family, folder, "-d", SAMPLE, *FLAGS, *KINDS[kind], *layers) == 0
            made[name, kind] = folder
        return made[name, kind]

    return of


def peft_updates(family, folder) -> dict:
    """{layer: the change of its weight} as peft has it, of the file for diffusers."""
    tensors, metadata = read_lora_tensors(folder / LORA)
    part = families.FAMILIES[family.name].denoiser
    settings = {
        k.removeprefix(f"{part}."): v for k, v in json.loads(metadata["lora_adapter_metadata"]).items()
    }
    module = getattr(diffusers.DiffusionPipeline.from_pretrained(family.base), part)
    module.add_adapter(peft.get_peft_config(settings))
    peft.set_peft_model_state_dict(module, {k.removeprefix(f"{part}."): v for k, v in tensors.items()})
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def lycoris_update(found: dict, shape) -> torch.Tensor:
    """What LyCORIS and ComfyUI make of a layer's tensors (https://arxiv.org/abs/2309.14859, section 3):
    alpha over the rank of the factors; where a LoKr has none, it is not scaled.
    """
    found = {name: value.double() for name, value in found.items()}
    if "hada_w1_a" in found:
        product = (found["hada_w1_a"] @ found["hada_w1_b"]) * (found["hada_w2_a"] @ found["hada_w2_b"])
        return (product * found["alpha"] / len(found["hada_w1_b"])).reshape(shape)
    if "lokr_w2" in found:
        second, scale = found["lokr_w2"], 1.0
    else:
        second, scale = found["lokr_w2_a"] @ found["lokr_w2_b"], found["alpha"] / len(found["lokr_w2_b"])
    first, second = found["lokr_w1"], second.flatten(1)
    rows = [torch.cat([one * second for one in row], dim=1) for row in first]
    return (torch.cat(rows) * scale).reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_others_make_of_the_file_what_was_trained(family, kind, trained):
    folder = trained(family.name, kind)
    updates, (tensors, metadata) = (
        peft_updates(family, folder),
        read_lora_tensors(folder / "mine.safetensors"),
    )
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"])["algo"] == kind
    prefix = {"unet": "lora_unet_", "transformer": "lycoris_"}[families.FAMILIES[family.name].denoiser]
    raw = {}
    for key, value in tensors.items():
        assert key.startswith(prefix)
        raw.setdefault(key.split(".")[0], {})[key.split(".")[1]] = value
    assert len(raw) == len(updates) and any(update.dim() == 4 for update in updates.values()) == (
        prefix[1] == "o"
    )
    read = [
        {layer: update for _, layer, update in read_lora(folder / file)}
        for file in ("mine.safetensors", LORA)
    ]
    whole = 0
    for (layer, update), own in zip(read[0].items(), raw.values(), strict=True):
        wanted = updates[layer].double()
        assert wanted.abs().max() > 1e-4
        assert torch.allclose(lycoris_update(own, wanted.shape), wanted, atol=1e-6)
        for ours in (update.delta(), read[1][layer].delta()):
            assert torch.allclose(ours.double(), wanted, atol=1e-6)
        whole += {"lokr_w1", "lokr_w2"} <= own.keys()
    assert whole < len(raw) and (whole > 0) == (
        kind == "lokr" and prefix == "lora_unet_"
    )  # a UNet's are of all sizes


@pytest.mark.parametrize(("name", "kind"), [("sdxl", "loha"), ("flux", "lokr")])
def test_infer_lora_draws_with_it_at_any_scale(name, kind, trained, tmp_path, capsys):
    """As the base with the same update merged in; both files of the training, and a file that is cut."""
    folder, family, drawn = trained(name, kind), FAMILIES[name], {}
    words = ["--prompt", "a red circle", "--num_inference_steps", "2", "--guidance_scale", "3"]
    words += ["--max_sequence_length", "77"] if name == "flux" else []
    for scale in ("1", "0.5"):
        merged = tmp_path / f"merged-{scale}"
        assert merge_lora.main([family.base, str(merged), "--lora", str(folder), scale]) == 0
        sources = {"merged": merged, "diffusers": folder, "others": folder / "mine.safetensors"}
        for source, path in sources.items():
            output = tmp_path / f"{source}-{scale}"
            own = ["--paths.base_model_path", str(merged)] if source == "merged" else [str(path)]
            own += (
                ["--config", str(tmp_path / "c.yaml")] if source == "merged" else ["--adapter_scale", scale]
            )
            (tmp_path / "c.yaml").write_text("seed: 3\nresolution: {width: 64, height: 64}\n")
            assert infer_lora.main([*own, *words, "--seed", "3", "--paths.infer_path", str(output)]) == 0
            drawn[source, scale] = np.asarray(Image.open(next(output.glob("*/0*.png")))).astype(int)
        for source in ("diffusers", "others"):
            assert np.abs(drawn[source, scale] - drawn["merged", scale]).max() <= 2
    assert np.abs(drawn["merged", "1"] - drawn["merged", "0.5"]).max() > 5
    (tmp_path / "cut").mkdir()
    tensors, metadata = read_lora_tensors(folder / LORA)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "cut" / LORA, metadata=metadata)
    capsys.readouterr()
    assert (
        infer_lora.main([str(tmp_path / "cut" / LORA), *words, "--paths.base_model_path", family.base]) == 2
    )
    assert "is missing, or fits no layer" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), [("sd15", "lokr"), ("flux", "loha")])
def test_the_tools_take_it(name, kind, trained, tmp_path, capsys):
    folder = trained(name, kind)
    for file in (folder, folder / "mine.safetensors"):
        assert inspect_lora.main([str(file)]) == 0
        assert f"{name} ({ {'loha': 'LoHa', 'lokr': 'LoKr'}[kind] })" in capsys.readouterr().out
    assert convert_lora.main([str(folder / LORA), str(tmp_path / "plain.safetensors"), "--rank", "8"]) == 0
    assert "became LoRA of rank 8" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("sdxl", "lokr"), ("sd3", "loha")])
def test_a_run_starts_from_it(name, kind, trained, tmp_path, capsys):
    family, folder = FAMILIES[name], trained(name, kind)
    flags = (
        "-d",
        SAMPLE,
        "--learning_rate",
        1e-7,
        "--max_train_steps",
        1,
        "--upcast_before_saving",
        "--init_lora",
    )
    assert run_here(family, tmp_path / "own", *flags, folder) == 0
    before, after = load_file(folder / LORA), load_file(tmp_path / "own" / LORA)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[key], value, atol=1e-6) for key, value in before.items())
    capsys.readouterr()
    assert run_here(family, tmp_path / "other", *flags, folder / "mine.safetensors") == 0
    said = capsys.readouterr()
    assert "became LoRA of rank 64" in said.out
    assert ("rank 48 to 64, alpha / rank 1" in said.out) == (name == "sdxl")  # whose toy has layers of 48
    for more, message in {("--rank", 5): "--rank 5", ("--lora_dropout", 0.1): "--lora_dropout 0.1"}.items():
        assert run_here(family, tmp_path / "out", *flags, folder, *more) == 2
        assert f"{message}: --init_lora" in capsys.readouterr().err


PROMPTS = "- a circle\n- {prompt: a star, lora_scale: 0}\n"


@pytest.mark.parametrize(("name", "kind"), [("sd15", "loha"), ("flux", "lokr")])
def test_all_that_a_lora_can_works_with_it(name, kind, tmp_path):
    """Half precision, a quantised and swapped base, text encoders, a class kept, samples at a scale of their
    own.
    """
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    one_step = ("--validation_inference_steps", 1)
    cases = {
        "text": ("--train_text_encoder", "--use_ema", "--optimizer", "adafactor"),
        "bits": ("--mixed_precision", "bf16", "--quantize_base", "nf4", "--blocks_to_swap", 2),
        "kept": (
            "--preserve_class",
            "circle",
            "--trigger_word",
            "sks",
            "--gradient_checkpointing",
            "--use_rslora",
        ),
        "drawn": ("--validation_prompts_file", tmp_path / "prompts.yaml", "--validation_steps", 3, *one_step),
    }
    for case, flags in cases.items():
        more = (
            *KINDS[kind],
            "--learning_rate",
            1e-2,
            *flags,
            *("--num_validation_images", int(case == "drawn")),
        )
        assert run_here(FAMILIES[name], tmp_path / case, "-d", SAMPLE, *more) == 0
        tensors = load_file(tmp_path / case / LORA)
        zero = "hada_w2_b" if kind == "loha" else "lokr_w2"  # at the start
        moved = [value.abs().max() > 0 for key, value in tensors.items() if zero in key]
        assert all(moved) and any("text_encoder" in key for key in tensors) == (case == "text")
    before, after = (tmp_path / "drawn" / "samples" / f"step-00000{n}" for n in (0, 3))
    files = ("00_00_a-circle.png", "01_00_a-star.png")
    same = [
        np.array_equal(*(np.asarray(Image.open(folder / file)) for folder in (before, after)))
        for file in files
    ]
    assert same == [False, True]


def test_what_does_not_go_with_it_is_said(tmp_path, capsys):
    wrong = {
        ("--lora_type", "loha", "--use_dora"): "--use_dora is for plain LoRAs",
        ("--lora_type", "lokr", "--init_lora_weights", "pissa"): "--init_lora_weights is for plain LoRAs",
        ("--lora_type", "lokr", "--merge_lora"): "scripts/lora/merge_lora.py merges a lokr",
        ("--lora_type", "loha", "--lokr_factor", "8"): "--lokr_factor has no effect without --lora_type lokr",
        ("--lora_type", "lokr", "--lokr_factor", "-3"): "1 or more",
    }
    for flags, message in wrong.items():
        words = ["-m", str(ROOT / "assets/toy_sd15"), "-d", str(SAMPLE), "-o", str(tmp_path), *flags]
        assert load_script("train_lora_sd15.py").main(words) == 2
        assert message in capsys.readouterr().err
