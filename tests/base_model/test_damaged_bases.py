"""A damaged base is one line that names the flag; a single file's marks say what its denoiser predicts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SAMPLE, run_here
from safetensors.torch import load_file, save_file

from lora_training.base_model.sources import prediction_settings

pytestmark = pytest.mark.faults

SD15 = FAMILIES["sd15"]


def lose_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if tensors[key].ndim == 2))
    save_file(tensors, file, metadata={"format": "pt"})


def replaced(old: str, new: str):
    """A damage: text of a file is replaced."""
    return lambda file: file.write_text(file.read_text().replace(old, new))


def written(content: str | bytes):
    """A damage: a file has other content."""
    return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


MODEL, ENCODER = "diffusion_pytorch_model.safetensors", "model.safetensors"
DAMAGED_BASES = {  # part, file, damage
    "weights cut": ("unet", MODEL, lambda file: file.write_bytes(file.read_bytes()[:-999])),
    "weights empty": ("vae", MODEL, written("")),
    "weights gone": ("text_encoder", ENCODER, Path.unlink),
    "a tensor gone": ("text_encoder", ENCODER, lose_a_tensor),
    "a tensor of the denoiser gone": ("unet", MODEL, lose_a_tensor),
    "configuration cut": ("unet", "config.json", cut),
    "configuration a list": ("vae", "config.json", written("[]")),
    "a number for a list": ("vae", "config.json", written('{"block_out_channels": 3}')),
    "a text for a number": ("vae", "config.json", replaced(": 16,", ': "16",')),
    "no layers": ("vae", "config.json", replaced('block": 1', 'block": -1')),
    "configuration gone": ("unet", "config.json", Path.unlink),
    "configuration not UTF-8": ("vae", "config.json", written(b"\xff{}")),
    "another width": ("unet", "config.json", replaced("64", "32")),
    "scheduler gone": ("scheduler", "scheduler_config.json", Path.unlink),
    "scheduler null": ("scheduler", "scheduler_config.json", written("null")),
    "tokenizer gone": ("tokenizer", "", shutil.rmtree),
    "index cut": ("", "model_index.json", cut),
    "index names no class": ("", "model_index.json", replaced("UNet2D", "Other")),
    "index names no library": ("", "model_index.json", replaced("diffusers", "d")),
    "index is too short": ("", "model_index.json", written('{"_class_name": "A", "unet": 3}')),
}


@pytest.mark.parametrize("case", DAMAGED_BASES)
def test_a_damaged_base_is_one_line(tmp_path, capsys, case):
    part, name, damage = DAMAGED_BASES[case]
    shutil.copytree(SD15.base, tmp_path / "base")
    damage(tmp_path / "base" / part / name)
    flags = ("-d", SAMPLE, "-m", tmp_path / "base", "--max_train_steps", 1, "--num_validation_images", 1)
    assert run_here(SD15, tmp_path / "x", *flags, "--validation_inference_steps", 1) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and "--pretrained_model_name_or_path" in lines[0] and "fault" not in lines[0]


def test_base_that_is_not_there_or_another_family(family, tmp_path, capsys):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "-m", "./nowhere") == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "-m", tmp_path / "base") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a OtherPipeline, not" in line


VELOCITY = {"prediction_type": "v_prediction"}
MARKS = {  # what a single file holds, its metadata; the scheduler's settings
    "epsilon": ({}, {}, {}),
    "v_pred": ({"v_pred": torch.tensor([])}, {}, VELOCITY),
    "both": (
        {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
        {},
        VELOCITY | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "SAI's metadata": ({}, {"modelspec.prediction_type": "v"}, VELOCITY),
    "SAI's metadata, epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, {}),
}


@pytest.mark.parametrize("case", MARKS)
def test_single_files_that_predict_velocity_say_so(tmp_path, case):
    tensors, metadata, expected = MARKS[case]
    save_file({"weight": torch.ones(1), **tensors}, tmp_path / "a.safetensors", metadata=metadata)
    assert prediction_settings(tmp_path / "a.safetensors") == expected
