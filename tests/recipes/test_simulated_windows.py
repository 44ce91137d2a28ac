"""A whole day's work on a simulated Windows: prepare, train, be stopped, go on, draw."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, SD15, losses, metrics, quick_flags, same_weights
from PIL import Image

pytestmark = pytest.mark.run

CAPTIONS = ("日本の猫, un été", "a cat → left", "a ☃ in the snow", "plain")
STEPS = 16


def write_photos(folder: Path) -> None:
    """Photos with names and captions that cp1252 has no letters for."""
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        image = Image.radial_gradient("L").convert("RGB").rotate(30 * number)
        image.resize((96, 80 + 16 * number)).save(folder / f"猫 {number}.png")
        (folder / f"猫 {number}.txt").write_text(caption, encoding="utf-8")


def plan_of_the_day(folder: Path) -> list[tuple[str, list[str], dict]]:
    """(program, arguments, options of windows.py) of each program, in order."""

    def training(name: str, *flags, **options):
        steps = ("--max_train_steps", STEPS, "--checkpointing_steps", STEPS)
        argv = quick_flags(SD15, folder / name, "-d", folder / "prepared", *steps, *flags)
        return str(ROOT / SD15.script), argv, options

    preparing = ["-d", folder / "mes photos", "-o", folder / "prepared"]
    preparing += ["--image_resizing", "target_resolution=64", "--image_filtering", "min_size=64"]
    pictures = ("--num_validation_images", 1, "--validation_inference_steps", 1)
    pictures += ("--validation_prompt", "日本の猫", "--skip_final_inference")
    resumed = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", 1, "--report")
    open_elsewhere = [str(folder / "stopped" / "stopped.safetensors")]
    drawing = [folder / "stopped", "--prompt", "日本の猫", "--paths.infer_path", folder / "drawn"]
    drawing += ["--num_inference_steps", 1]
    return [
        (str(ROOT / "scripts/dataset/prepare_dataset.py"), [str(word) for word in preparing], {}),
        training("whole"),
        training("stopped", stop_at=3),
        training("stopped", *pictures, *resumed, open=open_elsewhere),
        (str(ROOT / "infer_lora.py"), [str(word) for word in drawing], {}),
    ]


@pytest.mark.xdist_group("processes")
def test_windows_trains_stops_at_ctrl_break_resumes_bit_for_bit_and_draws(tmp_path):
    from ready_process import start

    write_photos(tmp_path / "mes photos")
    (tmp_path / "plan.json").write_text(json.dumps(plan_of_the_day(tmp_path)), encoding="utf-8")
    log, stopped = tmp_path / "windows.log", tmp_path / "stopped"
    process = start(ROOT / "tests" / "windows.py", [tmp_path / "plan.json"], {}, log, tmp_path)
    process.join(400)
    printed = log.read_bytes().decode("cp1252")
    codes = [line for line in printed.splitlines() if line.startswith("[")]
    assert codes and json.loads(codes[-1]) == [0, 0, 128 + 21, 0, 0], printed[-4000:]
    assert re.search(r"stopped by signal 21 \(\w+\) after step \d+; checkpoint-\d+ is written", printed)
    assert "stopped.safetensors is open in another program" in printed
    assert "going on from checkpoint-" in printed
    assert losses(stopped) == losses(tmp_path / "whole")
    assert [row["step"] for row in metrics(stopped) if "loss" in row] == list(range(1, STEPS + 1))
    (spare,) = stopped.glob("stopped-*.safetensors")
    spare.replace(stopped / "stopped.safetensors")
    assert same_weights(tmp_path / "whole", stopped)
    assert len(list((tmp_path / "drawn").rglob("0*.png"))) == 1
