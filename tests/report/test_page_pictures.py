"""The pictures of a run's page: which are shown, what they are called, how much they weigh."""

from __future__ import annotations

import base64
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from run_folders import assert_safe, full_run, page_of, save_picture

from lora_training.report.run_folder import read_run_folder

pytestmark = pytest.mark.unit


def test_pictures_come_with_their_prompt_seed_and_step(tmp_path):
    folder = full_run(tmp_path / "mine")
    run = read_run_folder(folder)
    assert [(s.step, s.seed) for s in run.samples if s.is_control and s.position[1] == 1] == [
        (s, "101") for s in (0, 20, 40, 60)
    ]
    html, page = page_of(folder)
    alts = [i["alt"] for i in page.all("img")]
    for step in ("before", "step 20", "step 40, advised", "step 60, last"):
        assert f"validation a sks circle: {step}, seed 100" in alts
    pair = html[html.index('class="pair"') :]
    pair = pair[: pair.index("</figure>")]
    assert re.findall(r"<small>([^<]+)</small>", pair) == [
        "before",
        "step 40, advised",
        "step 60, last",
        "seed 100",
    ]
    colours = []
    for data in re.findall(r"base64,([\w+/=]+)", pair):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            colours.append(image.convert("RGB").getpixel((30, 30)))
    assert colours == [(0, 0, 0), (160, 0, 0), (240, 0, 0)]
    assert html.count('data-names="before|step 20|step 40, advised|step 60, last"') == 2
    assert html.count('class="shot on" data-i="3"') == 4 and html.count('class="shot" data-i="0"') == 4


def test_control_pictures_stand_in_pairs(tmp_path):
    """Before and after were figures of their own, in odd rows: the pictures' names weren't understood."""
    prompts = ("a street", "a portrait", "a street", "a portrait")  # as a run draws them
    for step in (0, 30):
        for number, prompt in enumerate(prompts):
            file = tmp_path / f"samples/step-{step:06d}/control_{number}_{prompt.replace(' ', '-')}.png"
            save_picture(file, (step, 0, 0), prompt=prompt, seed=str(7 + number), kind="control")
    html, page = page_of(tmp_path)
    assert_safe(html, page, tmp_path)
    control = html[html.index('id="control"') :]
    assert re.findall(r'<h3 class="prompt">([^<]+)', control) == ["a portrait", "a street"]
    figures = control.split('<div class="pair">')[1:]
    told = [re.findall(r"<small>([^<]+)", figure) for figure in figures]
    assert told == [["before", "step 30, last", f"seed {seed}"] for seed in (8, 10, 7, 9)]
    assert "over the steps" not in control


def test_pictures_of_older_scripts_have_names_alone(tmp_path):
    for step in (0, 20, 40):
        for k in range(2):
            save_picture(tmp_path / f"samples/step-{step:06d}/00_{k:02d}.png", (step, 0, 0))
    (tmp_path / "samples/step-000040/00_01.png").write_bytes(b"half a picture")
    (tmp_path / "samples/step-000020/00_00.png").unlink()
    (tmp_path / "samples/step-x").mkdir()
    place = tmp_path / "logs" / "lora" / "1"
    place.mkdir(parents=True)
    (place / "hparams.yml").write_text("validation_prompt: '[''a sks circle'']'\nsnr_gamma: None\nrank: 16\n")
    html, page = page_of(tmp_path)
    assert_safe(html, page, tmp_path)
    assert "a sks circle: before, picture 1" in [i["alt"] for i in page.all("img")]
    assert "no picture" in page.text and "not drawn" in page.text
    assert "<td>snr_gamma<td>none" in html and "<td>rank<td>16" in html


def test_a_run_of_six_validations_stays_below_eight_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (1024, 1024, 3), dtype=np.uint8)  # no picture is harder to make small
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
    for step in range(0, 6):
        folder = tmp_path / f"samples/step-{step * 100:06d}"
        folder.mkdir(parents=True)
        for k in range(8):
            shutil.copy(tmp_path / "noise.png", folder / f"00_{k:02d}.png")
    Image.fromarray(np.tile(noise, (2, 2, 1))).save(tmp_path / "comparison.png", compress_level=0)
    for k in range(8):
        (tmp_path / "training_pictures").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"training_pictures/{k}.jpg")
    html, page = page_of(tmp_path)
    assert len(page.all("img")) == 8 * 6 + 8 * 2 + 8 + 1
    assert len(html) < 8_000_000
    assert all(int(i["width"]) >= 128 for i in page.all("img"))


def test_of_many_steps_the_ends_and_the_advised_one_are_shown(tmp_path):
    for step in range(0, 1000, 10):
        save_picture(tmp_path / f"samples/step-{step:06d}/00_00.png", (step % 255, 0, 0), 16)
    (tmp_path / "verdict.json").write_text('{"step": 410, "text": "Take step 410"}')
    html, page = page_of(tmp_path)
    names = page.all("div")[[("films" in a.get("class", "")) for a in page.all("div")].index(True)][
        "data-names"
    ].split("|")
    assert (
        len(names) <= 24
        and names[0] == "before"
        and names[-1] == "step 990, last"
        and "step 410, advised" in names
    )


def test_pictures_of_one_step_are_not_called_before_and_after(tmp_path):
    save_picture(tmp_path / "samples/step-000000/00_00.png", (0, 0, 0))
    assert "Pictures before training" in page_of(tmp_path)[1].text
    save_picture(tmp_path / "samples/step-000010/00_00.png", (0, 0, 0))
    html, page = page_of(tmp_path)
    assert "Before and after" in page.text and 'type="range"' not in html  # two steps need no slider
