"""Machines that the tests don't have: a simulated Windows, devices that are chosen but not used, the batch files as text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT, losses, metrics, quick_flags, same_weights
from PIL import Image

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which the simulated Windows has prepared pictures, trained, been stopped, gone on and drawn; and what it said."""
    folder = tmp_path_factory.mktemp("windows")
    photos = folder / "mes photos"
    photos.mkdir()
    for i, caption in enumerate(("日本の猫, un été", "a cat → left", "a ☃ in the snow", "plain")):
        Image.radial_gradient("L").convert("RGB").rotate(30 * i).resize((96, 80 + 16 * i)).save(photos / f"猫 {i}.png")
        (photos / f"猫 {i}.txt").write_text(caption, encoding="utf-8")
    steps = ("--max_train_steps", 40, "--checkpointing_steps", 40)

    def training(name: str, *words, **options):
        flags = quick_flags(FAMILIES["sd15"], folder / name, "-d", folder / "prepared", *steps, *words)
        return str(ROOT / "train_lora_sd15.py"), flags, options

    pictures = ("--num_validation_images", 1, "--validation_inference_steps", 2, "--validation_prompt", "日本の猫")
    resumed = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", 1)
    (folder / "stopped").mkdir()
    (folder / "stopped" / "stopped.safetensors").write_bytes(b"which ComfyUI has loaded")
    plan = [
        (
            str(ROOT / "scripts/dataset/prepare_dataset.py"),
            ["-d", str(photos), "-o", str(folder / "prepared"), "--image_resizing", "target_resolution=64"]
            + ["--image_filtering", "min_size=64"],
            {},
        ),
        training("whole", *pictures),
        training("stopped", *pictures, stop_at=5),
        training("stopped", *pictures, *resumed, open=[str(folder / "stopped" / "stopped.safetensors")]),
        (
            str(ROOT / "infer_lora.py"),
            [str(folder / "stopped"), "--prompt", "日本の猫", "--paths.infer_path", str(folder / "drawn")]
            + ["--num_inference_steps", "2"],
            {},
        ),
    ]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    told = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "windows.py"), str(folder / "plan.json")]
    ended = subprocess.run(command, capture_output=True, env=os.environ | told, cwd=folder, timeout=400)
    said = ended.stdout.decode("cp1252") + ended.stderr.decode("cp1252", "replace")
    codes = ended.stdout.decode("cp1252").splitlines()[-1]
    assert json.loads(codes) == [0, 0, 128 + 21, 0, 0], said[-4000:]
    return folder, said


def test_windows_trains_stops_at_ctrl_break_resumes_bit_for_bit_and_draws(windows):
    folder, said = windows
    assert re.search(r"after step \d+; checkpoint-\d+ is written", said)
    assert "going on from checkpoint-" in said
    assert losses(folder / "stopped") == losses(folder / "whole")
    assert [row["step"] for row in metrics(folder / "stopped") if "loss" in row] == list(range(1, 41))
    (spare,) = (folder / "stopped").glob("stopped-*.safetensors")
    spare.replace(folder / "stopped" / "stopped.safetensors")
    assert same_weights(folder / "whole", folder / "stopped")
    assert len(list((folder / "drawn").rglob("0*.png"))) == 1
