"""Which family a base is of, without reading its weights."""

import json
import subprocess
import sys

import torch
from conftest import ROOT
from safetensors.torch import save_file

from lora_training.base_model.family_detection import detect_family


def test_family_is_found_out(family, tmp_path):
    assert detect_family(family.base) == family.name
    names = {
        "flux": "double_blocks.0.x",
        "sd3": "model.diffusion_model.joint_blocks.0.x",
        "sdxl": "conditioner.embedders.1.x",
        "sd15": "model.diffusion_model.input_blocks.0.x",
    }
    for name, key in names.items():
        save_file({key: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        assert detect_family(str(tmp_path / f"{name}.safetensors")) == name
    torch.save({"state_dict": {names["sdxl"]: torch.zeros(1)}}, tmp_path / "x.ckpt")
    assert detect_family(str(tmp_path / "x.ckpt")) == "sdxl"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "Other"}))
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bases" / "detect_family.py"), str(tmp_path / "other")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "not a base of" in result.stderr
