"""Bases of another family, unusual and damaged ones: each is one line, and nothing is left behind."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, run_here
from safetensors.torch import load_file, save_file
from single_files import checkpoint_of
from trained_loras import save_small_lora

from lora_training import families
from lora_training.base_model import Components
from lora_training.errors import UserError
from lora_training.lora.single_file import single_file
from scripts.bases import detect_family, unpack_checkpoint
from scripts.lora import merge_lora

pytestmark = pytest.mark.run


@pytest.mark.parametrize("other", sorted(FAMILIES))
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_another_familys_base_is_told_in_one_line(name, other, tmp_path, capsys):
    if name == other:
        return
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "-m", FAMILIES[other].base) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"is a {FAMILIES[other].pipeline}, not {families.FAMILIES[name].title}" in line
    # one of the hub is looked at by the recipe alone
    recipe = importlib.import_module(Path(FAMILIES[name].script).stem)
    args = recipe.parse_args(["-m", "b", "-d", str(SAMPLE)])
    with pytest.raises(UserError, match=f"is a {FAMILIES[other].pipeline}, not "):
        recipe.check_base(Components(Path(FAMILIES[other].base), args, None, None))


OF_SCHEDULE, OF_VAE, OF_UNET = "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json"


UNUSUAL = {
    "EDM's schedule": (
        "sdxl",
        OF_SCHEDULE,
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
        "EDM's schedule",
    ),
    "a mean of the latents": (
        "sdxl",
        OF_VAE,
        {"latents_mean": [0.1, 0.2, 0.3, 0.4]},
        "a mean of its latents",
    ),
    "a spread of the latents": (
        "sdxl",
        OF_VAE,
        {"latents_std": [5.1, 5.2, 5.3, 5.4]},
        "a mean of its latents",
    ),
    "SDXL that predicts pictures": ("sdxl", OF_SCHEDULE, {"prediction_type": "sample"}, "predicts 'sample'"),
    "SD that predicts pictures": ("sd15", OF_SCHEDULE, {"prediction_type": "sample"}, "predicts 'sample'"),
    "SDXL for inpainting": ("sdxl", OF_UNET, {"in_channels": 9}, "9 input channels"),
    "SD for editing": ("sd15", OF_UNET, {"in_channels": 8}, "8 input channels"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_bases_that_would_be_trained_wrongly_are_refused(case, tmp_path, capsys):
    name, file, change, words = UNUSUAL[case]
    base = tmp_path / "base"
    shutil.copytree(FAMILIES[name].base, base)
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "-m", base) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "--pretrained_model_name_or_path" in line


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory) -> Path:
    return save_small_lora(tmp_path_factory.mktemp("lora"))


def damaged_copy(name: str, tmp_path: Path) -> Path:
    """A checkpoint or a folder of SD 1.5's toy with one damage."""
    if name.startswith("folder"):
        folder = tmp_path / "folder"
        shutil.copytree(FAMILIES["sd15"].base, folder)
        index, weights = folder / "model_index.json", folder / "unet" / "diffusion_pytorch_model.safetensors"
        if "weights" in name:
            weights.write_bytes(b"xx")
        elif "NaN" in name:
            save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)
        else:
            texts = {
                "broken": "{x",
                "list": "[]",
                "deep": "[" * 5000,
                "class": json.dumps({"_class_name": [1]}),
            }
            index.write_bytes(b"\xff\xfe" if "binary" in name else texts[name.split()[1]].encode())
        return folder
    tensors, file = single_file("sd15", ROOT / FAMILIES["sd15"].base), tmp_path / "x.safetensors"
    changes = {
        "NaN": lambda k, v: v * float("nan") if v.is_floating_point() and "attn" in k else v,
        "8 bits": lambda k, v: v.to(torch.int8),
        "narrow": lambda k, v: v[..., :3].contiguous() if v.dim() > 1 else v,
        "half": lambda k, v: v if "output_blocks" not in k else None,
    }
    change = changes.get(name, lambda k, v: v)
    changed = {k: change(k, v) for k, v in tensors.items()}
    save_file({k: v for k, v in changed.items() if v is not None}, file)
    raw = file.read_bytes()
    spoiled = {
        "cut": raw[:5000],
        "cut late": raw[:-100],
        "empty": b"",
        "page": b"<html>" * 99,
        "huge": b"\xff" * 8 + b"{}",
    }
    spoiled |= {
        "deep": (60000).to_bytes(8, "little") + b"[" * 60000,
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    file.write_bytes(spoiled.get(name, raw))
    return file


DAMAGES = ("cut", "cut late", "empty", "page", "huge", "deep", "list", "NaN", "8 bits", "narrow", "half")


OF_FOLDERS = tuple(
    f"folder {what}" for what in ("broken", "list", "deep", "binary", "class", "weights", "NaN")
)


@pytest.mark.parametrize("name", [*DAMAGES, *OF_FOLDERS])
def test_damaged_bases_end_in_one_line(name, small_lora, tmp_path, capsys):
    """In every command that reads one; nothing is left behind."""
    toy, damaged = FAMILIES["sd15"].base, damaged_copy(name, tmp_path)
    out = str(tmp_path / "out")
    if name.startswith("folder"):
        good = str(checkpoint_of(FAMILIES["sd15"], tmp_path / "good.safetensors"))
        commands = [(unpack_checkpoint.main, [good, out, "--layout", str(damaged)])] * (
            "weights" not in name and "NaN" not in name
        )
        commands += [(merge_lora.main, [str(damaged), out, "--lora", str(small_lora)])]
    else:
        commands = [
            (unpack_checkpoint.main, [str(damaged), out, "--layout", toy, *more])
            for more in ([], ["--family", "sd15"])
        ]
        lora = ["--lora", str(small_lora), "--shape", toy]
        commands += [
            (merge_lora.main, [str(damaged), f"{out}.safetensors", *lora, *more])
            for more in ([], ["--family", "sd15"])
        ]
    if not {"weights", "NaN"} & set(name.split()) and name not in ("cut late", "8 bits", "narrow", "half"):
        commands += [(detect_family.main, [str(damaged)])]
    for main, words in commands:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in line and len(line) < 700
    assert not [f.name for f in tmp_path.iterdir() if "out" in f.name]


@pytest.mark.parametrize(
    ("schedule", "is_distilled"),
    [
        ({"timestep_spacing": "trailing"}, True),
        ({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, False),
        ({"_class_name": "LCMScheduler"}, True),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, False),
    ],
)
def test_a_base_with_zero_terminal_snr_is_not_called_distilled(tmp_path, capsys, schedule, is_distilled):
    shutil.copytree(ROOT / FAMILIES["sdxl"].base, tmp_path / "base")
    file = tmp_path / "base" / OF_SCHEDULE
    file.write_text(json.dumps(json.loads(file.read_text()) | schedule))
    recipe = importlib.import_module(Path(FAMILIES["sdxl"].script).stem)
    args = recipe.parse_args(["-m", "b", "-d", str(SAMPLE)])
    recipe.check_base(Components(tmp_path / "base", args, None, None))
    assert ("was distilled to draw in a few steps" in capsys.readouterr().out) == is_distilled
