"""Settings of prepare_dataset.py: flags, files, what contradicts itself, and errors of one line."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from conftest import ROOT
from photo_folders import photo, prepare
from PIL import Image

from lora_training.prepare import read_settings
from lora_training.prepare.settings import Steps
from lora_training.settings import inner_model
from scripts.dataset import prepare_dataset

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def test_every_parameter_can_be_given_as_text():
    """The command line gives all values as text; each parameter takes its default back in that form."""
    for name, field in Steps.model_fields.items():
        model = inner_model(field)
        made = model(**{"model_type": "blip2"} if name == "auto_caption" else {})
        as_text = {
            key: ",".join(value)
            if isinstance(value, list)
            else str(value).lower()
            if value is not None
            else "off"
            for key, value in made.model_dump().items()
            if value is not None
            or key in ("blur_threshold", "max_tags", "general_threshold", "character_threshold")
        }
        assert {k: v for k, v in model(**as_text).model_dump().items() if k != "model_name"} == {
            k: v for k, v in made.model_dump().items() if k != "model_name"
        }


def test_yaml_and_json_say_the_same_as_flags(phone, tmp_path, capsys):
    values = {
        "data_dir": str(phone),
        "output_dir": str(tmp_path / "out"),
        "trigger_word": "sks",
        "steps": ["image_filtering", {"image_resizing": {"target_resolution": 96}}],
    }
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert prepare("--config", tmp_path / "c.json", "--image_resizing", "target_resolution=64") == 0
    assert Image.open(tmp_path / "out" / "cmyk.jpg").size == (64, 64)
    assert (
        prepare("--config", ROOT / "config" / "prepare_dataset.yaml", "-d", phone, "-o", tmp_path / "two")
        == 2
    )
    assert "blip2-opt-2.7b is neither a local folder" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("steps:\n  image_resising: {}\n")
    assert prepare("--config", tmp_path / "c.yaml", "-d", phone, "-o", tmp_path / "three") == 2
    assert "unknown key image_resising; the nearest is image_resizing" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-d IN -o OUT", "no step is switched on"),
        ("-d IN --image_filtering", "--output_dir is missing"),
        ("-o OUT --image_filtering", "give --data_dir"),
        ("-d NOWHERE -o OUT --image_filtering", "--data_dir NOWHERE: no such folder"),
        ("-d IN -o IN/out --image_filtering", "lie in one another"),
        ("-d IN -o USED --image_filtering", "holds files that are not from here"),
        ("-d IN -o OUT --image_filterin", "unknown flag --image_filterin; the nearest is --image_filtering"),
        ("-d IN -o OUT --image_filtering min_siz=3",
         "--image_filtering.min_siz: unknown parameter; the nearest is min_size"),
        ("-d IN -o OUT --image_filtering min_size=big",
         "--image_filtering.min_size: input should be a valid integer"),
        ("-d IN -o OUT --image_filtering min_size", "NAME=VALUE"),
        ("-d IN -o OUT --image_filtering min_aspect_ratio=3", "min_aspect_ratio is above max_aspect_ratio"),
        ("-d IN -o OUT --image_resizing mode=fit", "'cover' or 'contain'"),
        ("-d IN -o OUT --image_resizing fill=blu", "fill 'blu' is no colour"),
        ("-d IN -o OUT --image_resizing target_resolution=0", "should be one number, or width x height"),
        ("-d IN -o OUT --aspect_ratio_bucketing custom_buckets=5,5", "multiples of 8"),
        ("-d IN -o OUT --auto_caption model_type=auto", "model_type auto needs model_name"),
        ("-d IN -o OUT --auto_caption trigger_word=a --trigger_word b",
         "trigger_word is given as a and as b"),
        ("-d IN -o OUT --image_filtering --seed 3", "--seed is read by --doctor alone"),
        ("-d IN --doctor --image_filtering", "--doctor changes nothing"),
        ("-d IN --doctor --resolution 300", "--resolution 300 is not divisible by 8"),
        ("-d IN --doctor --aspect_ratio_buckets 3", "'3' is no \"height,width\""),
        ("-d IN --doctor --family flux --resolution 520", "--resolution 520 is not divisible by 16"),
        ("-d IN --doctor --validation_split 0.9", "leaves none of 1 images to train on"),
        ("--config NOWHERE.yaml", "--config NOWHERE.yaml: No such file"),
        ("-d EMPTY -o OUT --image_filtering", "no images in"),
        ("-d IN -o OUT --image_filtering min_size=4000", "none of 1 images is left"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("IN", "USED", "EMPTY"):
        (tmp_path / name).mkdir()
    photo(300, 300).save(tmp_path / "IN" / "a.png")
    (tmp_path / "USED" / "thesis.txt").write_text("mine")
    try:
        code = prepare(*arguments.split())
    except SystemExit as stop:
        code = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if line and "images/s" not in line]
    assert code == 2 and len(error) == 1, error
    assert expected in error[0]


@pytest.mark.parametrize(
    ("arguments", "bucket", "error"),
    [
        (["--image_resizing", "target_resolution=256"], (256, 256), None),
        (["--image_resizing", "target_resolution=128x512"], (256, 256), None),
        (["--image_resizing", "quality=90"], (512, 512), None),
        (
            ["--image_resizing", "target_resolution=512", "--aspect_ratio_bucketing", "base_resolution=256"],
            None,
            "512x512",
        ),
        (
            [
                "--image_resizing",
                "target_resolution=64",
                "--aspect_ratio_bucketing",
                "custom_buckets=128,128",
            ],
            None,
            "64x64",
        ),
        (
            [
                "--image_resizing",
                "target_resolution=128",
                "--aspect_ratio_bucketing",
                "custom_buckets=128,128",
            ],
            (128, 128),
            None,
        ),
    ],
)
def test_a_target_resolution_beside_buckets_is_obeyed_or_an_error(arguments, bucket, error, tmp_path, capsys):
    """Buckets that pictures are written at have the target's area, unless theirs is set too."""
    (tmp_path / "in").mkdir()
    photo(600, 600, 1).save(tmp_path / "in" / "a.png")
    arguments = (
        [*arguments] if "--aspect_ratio_bucketing" in arguments else [*arguments, "--aspect_ratio_bucketing"]
    )
    code = prepare("-d", tmp_path / "in", "-o", tmp_path / "out", *arguments, "resize_images=true")
    if error:
        assert code == 2 and f"target_resolution {error} has no effect" in capsys.readouterr().err
    else:
        assert code == 0 and Image.open(tmp_path / "out" / "a.jpg").size == bucket


def test_the_commands_of_the_pages_are_taken(tmp_path, monkeypatch, capsys):
    """Every command in docs/data.md and in the program's docstring passes the check of its settings."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8") + prepare_dataset.__doc__
    text = text.replace("\\\n", " ")
    commands = re.findall(r"(?:run_prepare_dataset\.sh|prepare_dataset\.py) (-d photos -o .*)", text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir(), (tmp_path / "prepared").mkdir()
    assert len(commands) >= 2
    for command in commands:
        read_settings(shlex.split(command))
