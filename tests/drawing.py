"""What tests of drawing share: pictures drawn, folders as trainings leave them, a short command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml
from conftest import FAMILIES
from PIL import Image


def drawn(tmp_path) -> dict[str, np.ndarray]:
    """The pictures of the last run in tmp_path/out, by the files' names."""
    folders = sorted((tmp_path / "out").iterdir())
    return {f.name: np.asarray(Image.open(f)).astype(int) for f in sorted(folders[-1].glob("*.png"))}


def as_trained(family, trained: Path, target: Path, **settings) -> Path:
    """A copy of a training's folder with the config.yaml that training scripts leave."""
    shutil.copytree(trained, target)
    values = {
        "pretrained_model_name_or_path": family.base,
        "resolution": [64],
        "seed": 5,
        "validation_inference_steps": 2,
        "validation_guidance_scale": 3.0,
        "token_abstraction": "circle",
        "clip_skip": None,
        "rescale_betas_zero_snr": False,  # a flag that was not given: the base's own schedule holds
        **dict(family.extra),
    }
    (target / "config.yaml").write_text(yaml.safe_dump(values | settings))
    return target


def plain_arguments(tmp_path, *more: str) -> list[str]:
    """A command line that draws with the toy base alone."""
    (tmp_path / "c.yaml").write_text("paths: {}\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--paths.base_model_path", FAMILIES["sd15"].base]
    argv += ["--paths.infer_path", str(tmp_path / "o"), "--prompt", "a", "--num_inference_steps", "2"]
    return [*argv, "--resolution.width", "64", "--resolution.height", "64", *more]
