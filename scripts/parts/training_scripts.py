"""The training scripts as modules, for the commands that work with what they know."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "sd15": "train_lora_sd15.py",
    "sdxl": "train_lora_sdxl.py",
    "sd3": "train_lora_sd3.py",
    "flux": "train_dreambooth_lora_flux_advanced.py",
}


def bare_script(family: str):
    """The family's training script as a module without any package: its command line and its constants."""
    spec = importlib.util.spec_from_file_location(f"{family}_script", ROOT / SCRIPTS[family])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_script(family: str, libraries: bool = True):
    """The family's training script as a module, with its libraries, or with those alone that read pictures."""
    module = bare_script(family)
    if libraries:
        module.import_libraries()
    else:
        module.import_image_libraries()
    return module
